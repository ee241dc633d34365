"""Has processes take a term and die at failpoints; each gets a successor. `python tenure_nursery.py` reads its cases.

A case is [moment, database, folder]; what became of it is a line of JSON. Processes are forked, so that each costs
nothing but what it does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from privfed import failpoint
from privfed.runtime.database import open_database
from privfed.runtime.sql_schema import sql, tenures
from privfed.runtime.tenure import Tenure
from privfed.runtime.term_folder import take_folder

SECONDS = 0.6


def hold(url: str, shared: Path, owner: str) -> None:
    """Take the term, renew it once, and resign."""
    tenure = Tenure(url, owner, SECONDS)
    tenure.addresses = {"fleet": owner}
    take_folder(shared, tenure.await_turn())
    time.sleep(SECONDS / 2)
    tenure.resign()


def forked(url: str, shared: Path, owner: str) -> int:
    """Return how a process that holds the term once ended, as `waitpid` says it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            hold(url, shared, owner)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main() -> None:
    points = Path(os.environ[failpoint.VARIABLE])
    failpoint.take_up("superlink")
    for moment, url, folder in json.load(sys.stdin):
        point = points / f"superlink.{moment}"
        point.touch()
        died = forked(url, Path(folder), "victim")
        struck = not point.exists()
        point.unlink(missing_ok=True)
        lived = forked(url, Path(folder), "successor")
        engine = open_database(url)
        with engine.connect() as connection:
            row = connection.execute(sql.select(tenures)).one()
        engine.dispose()
        facts = {"died": died, "struck": struck, "lived": lived, "term": row.term, "owner": row.owner}
        sys.stdout.write(json.dumps({"moment": moment, **facts, "addresses": row.addresses}) + "\n")


if __name__ == "__main__":
    main()
