"""`privfed verify`: audit logs and privacy ledgers, as they were written."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--key", metavar="HEX", help="Public key the log must be signed with.")
@click.option(
    "--checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="It must contain this."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def verify(path: Path, key: str | None, checkpoint: Path | None, debug: bool) -> None:
    """Check the audit log or privacy ledger in PATH (a file, or a folder of them): every line, its hash and signature.

    Finds any flipped byte, any line taken out, put in or moved; with --checkpoint also a tail that was cut off.
    """
    from privfed.errors import AppError

    del debug
    files = [path] if path.is_file() else sorted(path.rglob("audit.jsonl")) + sorted(path.rglob("*ledger*.jsonl"))
    if not files:
        raise AppError(f"{path} holds no audit.jsonl and no privacy ledger")
    if (key or checkpoint) and len(files) > 1:
        raise AppError("--key and --checkpoint are for one log: give its file")
    for file in files:
        click.echo(_verify(file, key, checkpoint))


def _verify(file: Path, key: str | None, checkpoint: Path | None) -> str:
    from privfed.errors import AppError

    with file.open("rb") as stream:
        ledger = b"privfed-privacy-ledger" in stream.readline(1 << 16)
    if ledger:
        if key or checkpoint:
            raise AppError(f"{file} is a privacy ledger: it has neither key nor checkpoint")
        return _verify_ledger(file)
    from privfed.runtime.audit_log import verify_log

    found = verify_log(file, key=key, checkpoint=checkpoint.read_bytes() if checkpoint is not None else None)
    trust = "" if key or checkpoint else " (named by the log itself: compare it with the machine's)"
    cut = f"; a crash left {found.cut} bytes of an unfinished line" if found.cut else ""
    return f"{file}: {found.lines} lines hold, head {found.head}, signed by {found.key}{trust}{cut}"


def _verify_ledger(file: Path) -> str:
    from privfed.errors import AppError
    from privfed.privacy.ledger import Ledger, LedgerError

    try:
        ledger = Ledger.read(file)
    except LedgerError as fault:
        raise AppError(f"{file}: {fault}") from None
    again = ledger.replay()
    if not again.agrees:
        raise AppError(
            f"{file}: its charges add up to {again.recomputed:.9g}, it says {again.stored:.9g}; the latter governs"
        )
    count = len(ledger.entries)
    return f"{file}: {count} charges hold, spent {ledger.spent:.6g} {ledger.measure}, limit {ledger.limit:g}"
