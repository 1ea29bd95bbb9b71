"""``kachery-fast channel pubsub``: by which pub/sub service a channel's messages go."""

from __future__ import annotations

import click

from ..errors import InvalidArgument
from .channel_bucket import end_of_test, steps_of, test_option
from .output import command_errors, emit
from .owner import ask_hub, hub_options, read_secret

__all__ = ["pubsub"]


@click.command()
@click.argument("name")
@click.option("--ably", is_flag=True, help="Use your account at Ably; needs --key.")
@click.option("--key", "key_file", metavar="FILE", help="A file with an API key of Ably's, APP.KEY:SECRET.")
@click.option("--endpoint", default="", metavar="HOST", help="Another server that speaks Ably's protocol.")
@click.option("--nats", "nats_url", metavar="URL", help="Use this NATS server (nats://, tls://, ws:// or wss://); "
                                                        "needs --account and --seed.")
@click.option("--account", metavar="ID", help="The id of your account there, A….")
@click.option("--seed", "seed_file", metavar="FILE", help="A file with the seed of a signing key of the account, SA….")
@click.option("--use", "used", metavar="SERVICE", help="Use one that the hub knows (kachery-fast channel engines).")
@click.option("--own", is_flag=True, help="Use the hub's own broker.")
@test_option
@click.option("--as", "known_as", metavar="NAME", help="What to call it at the hub. [default: ably, or nats]")
@hub_options
@command_errors
def pubsub(
    name: str, ably: bool, key_file: str | None, endpoint: str, nats_url: str | None, account: str | None,
    seed_file: str | None, used: str | None, own: bool, tested: bool | None, known_as: str | None, hub_url: str | None,
    token: str | None, as_json: bool,
) -> None:
    """Show by which pub/sub service the messages of the channel NAME go, or have them go by another one: --ably,
    --nats, --use or --own.

    Nodes move there by themselves. The hub keeps the credentials encrypted, signs the nodes' tokens with them, and
    shows them to nobody. A service that the hub did not know is tested, and the command ends with exit code 5 if
    something is wrong.
    """
    if [ably, nats_url is not None, used is not None, own].count(True) > 1:
        raise InvalidArgument(what="Choose one of --ably, --nats, --use and --own.")
    if (not ably and (key_file or endpoint)) or (nats_url is None and (account or seed_file)):
        raise InvalidArgument(what="--key and --endpoint go with --ably, --account and --seed with --nats.")
    if ably:
        if key_file is None:
            raise InvalidArgument(what="--ably needs --key FILE.")
        used = ask_hub(hub_url, token, "addAbly", name=known_as or "ably", apiKey=read_secret(key_file),
                       endpoint=endpoint)["id"]
    elif nats_url is not None:
        if account is None or seed_file is None:
            raise InvalidArgument(what="--nats needs --account ID and --seed FILE.")
        used = ask_hub(hub_url, token, "addNats", name=known_as or "nats", url=nats_url, account=account,
                       seed=read_secret(seed_file))["id"]
    elif known_as is not None:
        raise InvalidArgument(what="--as goes with --ably or --nats.")
    if used is None and not own:
        shown = {"channel": name, "name": ask_hub(hub_url, token, "showChannel", channel=name)["pubsub"]}
    else:
        shown = ask_hub(hub_url, token, "setPubsub", channel=name, engine=used)
    if tested is None:
        tested = ably or nats_url is not None
    if tested:
        shown["test"] = ask_hub(hub_url, token, "testChannel", channel=name)
    text = f"{name}: messages go by " + ("the hub's own broker" if shown["name"] is None else f"{shown['name']!r}")
    emit(shown, "\n".join([text, *(steps_of(shown["test"]) if tested else [])]), as_json)
    if tested:
        end_of_test(shown["test"])
