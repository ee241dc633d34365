"""`privfed keys`: a federation's authority, certificates and roster."""

from __future__ import annotations

import json
from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ROLES = ("node", "link", "operator", "submitter", "viewer")
_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
_authority = click.option(
    "--authority", "authority_dir", type=FOLDER, default="authority", show_default=True, help="The authority's folder."
)
_days = click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="Days it is valid.")


@click.group()
def keys() -> None:
    """Make a federation's authority, and certificates for its nodes, links and users.

    \b
    On one machine:      privfed keys init authority --name FEDERATION
                         privfed keys make node-a --role node --name hospital-a
    On two machines:     privfed keys request node-a --role node --name hospital-a
      at the authority:  privfed keys answer request.json -o answer.json
      and back:          privfed keys accept node-a answer.json
    """


@keys.command()
@click.argument("folder", type=FOLDER, default="authority")
@click.option("--name", required=True, help="The federation's name.")
@click.option("--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="Days it is valid.")
@_debug
def init(folder: Path, name: str, days: int) -> None:
    """Make a new authority in FOLDER [default: authority]. Keep the folder off the network and back it up."""
    from privfed.runtime.authority import Authority
    from privfed.runtime.certificate import fingerprint

    authority = Authority.create(folder, name, days=days)
    click.echo(f"authority of {name} in {folder}, valid until {authority.certificate.not_valid_after_utc:%Y-%m-%d}")
    click.echo(f"SHA-256 {fingerprint(authority.certificate)}")


@keys.command()
@click.argument("folder", type=FOLDER)
@click.option("--role", type=click.Choice(ROLES), required=True)
@click.option("--name", required=True, help="Name of the node, link or user.")
@click.option("--host", "hosts", multiple=True, help="Of a link: a name or address it is reached by; repeatable.")
@_debug
def request(folder: Path, role: str, name: str, hosts: tuple[str, ...]) -> None:
    """Make keys in FOLDER and a request to carry to the authority. Private keys stay in FOLDER."""
    from privfed.runtime.authority import make_request

    path = make_request(folder, role, name, hosts)
    click.echo(f"keys in {folder}; carry {path} to the authority, and its answer back to `privfed keys accept`")


@keys.command()
@click.argument("request_file", type=FILE)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The answer.")
@_authority
@_days
@_debug
def answer(request_file: Path, out: Path, authority_dir: Path, days: int) -> None:
    """Issue what REQUEST_FILE asks for. Check out of band that it is the member's own before you do."""
    import msgspec

    from privfed.runtime.authority import Authority

    peer, issued = Authority.open(authority_dir).answer(request_file.read_bytes(), days=days)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(issued)) + b"\n")
    click.echo(f"{peer.common_name} ({peer.role} {peer.name}), valid until {peer.expires:%Y-%m-%d}: carry {out} back")


@keys.command()
@click.argument("folder", type=FOLDER)
@click.argument("answer_file", type=FILE)
@_debug
def accept(folder: Path, answer_file: Path) -> None:
    """Put the authority's ANSWER_FILE into the key FOLDER it was asked from."""
    from privfed.runtime.certificate import fingerprint
    from privfed.runtime.credentials import Credentials, accept_answer

    peer = accept_answer(folder, answer_file.read_bytes())
    authority = Credentials.load(folder).trust.authority
    click.echo(f"{folder} is {peer.common_name} ({peer.role} {peer.name}), valid until {peer.expires:%Y-%m-%d}")
    click.echo(f"authority SHA-256 {fingerprint(authority)}: compare it with the authority's")


@keys.command()
@click.argument("folder", type=FOLDER)
@click.option("--role", type=click.Choice(ROLES), help="[default: what the folder was made for]")
@click.option("--name", help="Name of the node, link or user.")
@click.option("--host", "hosts", multiple=True, help="Of a link: a name or address it is reached by; repeatable.")
@_authority
@_days
@_debug
def make(
    folder: Path, role: str | None, name: str | None, hosts: tuple[str, ...], authority_dir: Path, days: int
) -> None:
    """Request, answer and accept in one step, where the authority is on this machine; renew a FOLDER that has keys."""
    import msgspec

    from privfed.runtime.authority import Authority, make_request
    from privfed.runtime.credentials import accept_answer

    authority = Authority.open(authority_dir)
    path = folder / "request.json"
    if not path.exists():
        if role is None or name is None:
            raise click.UsageError("--role and --name are needed to make new keys")
        path = make_request(folder, role, name, hosts)
    elif role or name or hosts:
        raise click.UsageError(f"{folder} already has keys: renew them without --role, --name and --host")
    _, issued = authority.answer(path.read_bytes(), days=days)
    peer = accept_answer(folder, msgspec.json.encode(issued))
    click.echo(f"{folder} is {peer.common_name} ({peer.role} {peer.name}), valid until {peer.expires:%Y-%m-%d}")


@keys.command()
@click.argument("member")
@click.option("--reason", default="", help="Written into the revocation list.")
@_authority
@_debug
def revoke(member: str, reason: str, authority_dir: Path) -> None:
    """Revoke all certificates of MEMBER (a name, or e.g. node-7). Give the new roster to the SuperLink."""
    from privfed.runtime.authority import Authority

    authority = Authority.open(authority_dir)
    revoked = authority.revoke(member, reason)
    click.echo(f"revoked {len(revoked)} certificates; roster version {authority.roster.version}")
    click.echo(f"put {authority_dir / 'roster.json'} into the SuperLink's key folder: it takes it up without a restart")


@keys.command()
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the signed roster to a file.")
@_authority
@_debug
def roster(form: str, out: Path | None, authority_dir: Path) -> None:
    """Show the nodes of the federation and what is revoked."""
    from privfed.runtime.authority import Authority

    authority = Authority.open(authority_dir)
    if out is not None:
        out.write_bytes(authority.roster_document)
    current = authority.roster
    if form == "json":
        import msgspec

        click.echo(msgspec.json.encode(current).decode())
        return
    click.echo(f"federation {current.federation}, roster version {current.version}")
    for member in current.nodes:
        click.echo(f"node {member.node:<6} {member.name:<24} signing key {member.identity[:16]}...")
    for one in current.revoked:
        click.echo(f"revoked {one.subject:<24} {one.date} {one.reason}".rstrip())


@keys.command()
@click.argument("folder", type=FOLDER)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_debug
def show(folder: Path, form: str) -> None:
    """Check a key FOLDER and say whose it is and when it expires."""
    from privfed.runtime.certificate import fingerprint
    from privfed.runtime.credentials import Credentials

    held = Credentials.load(folder)
    if held.peer.node_id is not None:
        held.identity()
    facts = {
        "member": held.peer.common_name,
        "role": held.peer.role,
        "name": held.peer.name,
        "expires": f"{held.certificate.not_valid_after_utc:%Y-%m-%d}",
        "federation": held.trust.roster.federation,
        "roster": held.trust.roster.version,
        "authority": fingerprint(held.trust.authority),
    }
    if form == "json":
        click.echo(json.dumps(facts))
    else:
        for key, value in facts.items():
            click.echo(f"{key:<11}{value}")
    for warning in held.warnings():
        click.echo(f"warning: {warning}", err=True)
