"""`factory gate`: the validator over HTTP. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The gate over HTTP: serve it, check its policy.", no_args_is_help=True, rich_markup_mode=None)


@app.command("serve")
def serve(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    run: Annotated[str | None, typer.Option("--run", help="Whose weights; without it the starter's.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="Beyond loopback a token is required, and TLS is wise.")
    ] = "127.0.0.1",
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="A recipe's YAML whose section `gate` counts; followed as it changes."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Mode 0600; by default the variable FACTORY_GATE_TOKEN.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM, with its chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM.")] = None,
    audit: Annotated[
        Path, typer.Option("--audit", help="Folder of the audit log: a line per decision, no image.")
    ] = Path("gate-audit"),
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1, help="That load may start.")] = 2,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests; the next is answered 429.")] = 64,
) -> None:
    """Judge images and masks for whoever asks, until SIGINT or SIGTERM. The page at / says how to ask."""
    from factory.gateway.settings import Settings, check_exposure

    tls = (None if tls_cert is None else str(tls_cert), None if tls_key is None else str(tls_key))
    token = None if token_file is None else str(token_file.resolve())
    limits = Settings(audit=str(audit.resolve()), token_file=token, max_waiting=max_waiting)
    settings = check_exposure(host, limits, *tls)
    from factory.runtime import gate_http

    arguments = gate_http.GateArguments(run=run, max_replicas=max_replicas, settings=settings)
    gate_http.serve_here(arguments, None if policy is None else str(policy), host, port, tls, typer.echo)


@app.command("policy")
def policy(
    file: Annotated[Path, typer.Argument(help="A recipe's YAML whose section `gate` counts.")],
) -> None:
    """Check a policy file, and print it with every default filled in and the version that answers will name."""
    import json

    from factory.gateway.policy_file import PolicyFile

    section = PolicyFile(file).read()
    from factory.gateway.model import policy_digest

    typer.echo(json.dumps(section.model_dump(exclude={"weights"}), indent=2))
    typer.echo(f"policy      {policy_digest(section)}")
