"""Run a mail server that keeps what it takes, can be down, refuse, or accept connections and say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from aiosmtpd.controller import Controller

from tests.testbed.process import LOOPBACK, free_port, listening, wait_until

if TYPE_CHECKING:
    from email.message import EmailMessage


@dataclass(frozen=True)
class Mail:
    """One mail as it came over the wire."""

    sender: str
    to: tuple[str, ...]
    message: EmailMessage = field(repr=False)

    @property
    def subject(self) -> str:
        # A line that is too long begins on the next one.
        return str(self.message["Subject"]).strip()

    @property
    def text(self) -> str:
        return self._part("plain")

    @property
    def html(self) -> str:
        return self._part("html")

    def _part(self, kind: str) -> str:
        part = self.message.get_body((kind,))
        assert part is not None
        return str(part.get_content()).replace("\r\n", "\n")


class MailServer:
    """A real SMTP server on loopback, in a thread of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.mails: list[Mail] = []
        self.refuse: str = ""
        """What it answers to recipients, such as ``550 5.1.1 no such user``."""
        self._controller: Controller | None = None

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        if self.refuse:
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        self.mails.append(Mail(envelope.mail_from, tuple(envelope.rcpt_tos), message))  # type: ignore[arg-type]
        return "250 taken"

    @property
    def subjects(self) -> list[str]:
        return [mail.subject for mail in self.mails]

    def start(self) -> None:
        """Serve, on the same port each time."""
        if self._controller is None:
            self._controller = Controller(
                self, hostname=LOOPBACK, port=self.port, enable_SMTPUTF8=True, ready_timeout=20
            )
            self._controller.start()
            wait_until(lambda: listening(self.port), what="the mail server")

    def stop(self) -> None:
        """Be down: connections are refused."""
        if self._controller is not None:
            asyncio.run_coroutine_threadsafe(_drained(), self._controller.loop).result(10)
            self._controller.stop()
            self._controller = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


async def _drained() -> None:
    """Wait until every connection has ended: the loop is closed over any that has not."""
    while asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.sleep(0.01)
    # What they left to be done by the loop is done before this.
    await asyncio.sleep(0.01)


class SilentServer:
    """Accepts connections, and says nothing for ever."""

    def __init__(self) -> None:
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self.listener.getsockname()[1])
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self.listener.accept()[0])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()
        self._thread.join(5)
