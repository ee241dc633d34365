"""Migrations of the durable store, run by `privfed.runtime.database` whenever a database is opened."""
