"""One file a version of the tables, named after its revision; what is released is never changed."""
