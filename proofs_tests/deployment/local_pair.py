"""Two SuperLinks in a thread of the test, on one PostgreSQL: the first serves, the second passes calls on to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.credentials import Credentials
from privfed.runtime.federation import open_app
from privfed.runtime.listeners import Listeners
from privfed.runtime.oidc import Tokens
from privfed.runtime.standby import Standby
from privfed.runtime.superlink import SuperLink, SuperLinkOptions
from privfed.runtime.tenure import Tenure
from proofs_tests.deployment.local_link import FreshLauncher
from proofs_tests.deployment.loop_thread import LoopThread
from proofs_tests.runtime.postgres import server


class LocalPair(LoopThread):
    """A context: both run inside it. `serving` and `passing` are their listeners' addresses."""

    def __init__(
        self, folder: Path, credentials: tuple[Credentials, Credentials] | None, tokens: Tokens | None
    ) -> None:
        self.folder = folder
        self._url = server().database()
        self._options = [
            SuperLinkOptions(
                home=folder / name,
                fleet="127.0.0.1:0",
                control="127.0.0.1:0",
                monitor="127.0.0.1:0",
                token_control="127.0.0.1:0" if tokens is not None else None,
                tokens=tokens,
                credentials=credentials[number] if credentials is not None else None,
                tenure=Tenure(self._url, name, 60.0),
            )
            for number, name in enumerate(("first", "second"))
        ]
        super().__init__()

    async def _start(self) -> None:
        self.listeners = [Listeners(options) for options in self._options]
        for options, listeners in zip(self._options, self.listeners, strict=True):
            assert options.tenure is not None
            standby = Standby(options, options.tenure, listeners)
            await standby.start()
            if options is self._options[0]:
                state = await standby.await_turn(self.folder / "shared")
                self.link = SuperLink(replace(options, state=state), FreshLauncher(), listeners)
                await self.link.start()
        self._turn = asyncio.create_task(standby.await_turn(self.folder / "shared"))
        while self.listeners[1].fault:
            await asyncio.sleep(0.02)

    async def _stop(self) -> None:
        assert self._options[1].tenure is not None
        await asyncio.to_thread(self._options[1].tenure.resign)
        await asyncio.gather(self._turn, return_exceptions=True)
        await self.listeners[1].stop()
        self.listeners[1].close()
        await self.link.stop()

    @property
    def serving(self) -> dict[str, str]:
        return self.listeners[0].addresses

    @property
    def passing(self) -> dict[str, str]:
        return self.listeners[1].addresses

    @property
    def mark(self) -> str:
        """Of the term, as who shares the database knows it."""
        assert self._options[0].tenure is not None
        return self._options[0].tenure.mark

    def submit(self, app: Path, nodes: int, by: Credentials | None = None, **settings: object) -> str:
        """Submit to the one that passes on."""
        with ControlClient(self.passing["control"], by) as control:
            texts = {name.replace("_", "-"): str(value) for name, value in settings.items()}
            return control.submit(Submission(open_app(app), texts, seed=1, nodes=nodes)).name
