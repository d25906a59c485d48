"""The page, served to this machine only.

Every request needs the token from the address and a Host header that names this machine (against DNS rebinding);
a change also needs the page's own Origin. Every change names the comparison it is meant for; if that is no longer the
current one, the reply is 409 with the current comparison.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
from importlib.resources import files
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_fast.console import visible
from dpo_fast.curate.by_hand.session import CHOICES, JudgingSession, StaleError
from dpo_fast.errors import UserError, WriteError

HOST = "127.0.0.1"
# How long the last judgement can still be undone once all is judged.
SECONDS_TO_END = 10.0
_PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_BODY_LIMIT = 1000
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer:
    """The page of one session; it listens from construction on and answers while `run` runs."""

    def __init__(self, session: JudgingSession, port: int, *, seconds_to_end: float = SECONDS_TO_END) -> None:
        """Bind the port; 0 picks a free one.

        Raises:
            UserError: the port cannot be bound.
        """
        self._session, self._seconds_to_end = session, seconds_to_end
        self._end: asyncio.TimerHandle | None = None
        self._socket = _listen(port)
        token = secrets.token_urlsafe(32)
        self.address = f"http://{HOST}:{self._socket.getsockname()[1]}/{token}/page.html"
        folder = files(__package__)
        routes = [
            Route(f"/{token}/{name}", _constant(folder.joinpath(name).read_bytes(), kind), methods=["GET"])
            for name, kind in _PAGE.items()
        ]
        routes += [
            Route(f"/{token}/state", self._state, methods=["GET"]),
            Route(f"/{token}/judge", self._judge, methods=["POST"]),
            Route(f"/{token}/undo", self._undo, methods=["POST"]),
        ]
        self._server = uvicorn.Server(
            uvicorn.Config(
                _Guard(Starlette(routes=routes), token),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=2,
            )
        )

    def run(self) -> None:
        """Serve until all is judged and a page has been told so, or until `stop`."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Stop `run`, from any thread."""
        self._server.should_exit = True

    def __enter__(self) -> PageServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    async def _state(self, request: Request) -> Response:
        return self._answer(200)

    async def _judge(self, request: Request) -> Response:
        body = await _read_body(request)
        if body.get("choice") not in CHOICES:
            raise HTTPException(400, f"choice: expected one of {', '.join(CHOICES)}")
        return self._change(lambda: self._session.judge(body["place"], body["choice"]))

    async def _undo(self, request: Request) -> Response:
        body = await _read_body(request)
        return self._change(lambda: self._session.undo(body["place"]))

    def _change(self, change: Any) -> Response:
        try:
            change()
        except StaleError:
            return self._answer(409)
        except WriteError as error:
            return _json({"error": f"not saved, so it does not count: {error}"}, 507)
        return self._answer(200)

    def _answer(self, status: int) -> Response:
        """The current state. Telling a page that all is judged starts the countdown to the end; an undo cancels it."""
        finished = self._session.is_finished
        if finished and self._end is None:
            self._end = asyncio.get_running_loop().call_later(self._seconds_to_end, self.stop)
        elif not finished and self._end is not None:
            self._end.cancel()
            self._end = None
        return _json(_state(self._session) | {"seconds_to_end": self._seconds_to_end}, status)


def _state(session: JudgingSession) -> dict[str, Any]:
    progress = session.progress()
    state: dict[str, Any] = {
        "place": session.place,
        "finished": session.is_finished,
        "can_undo": session.can_undo,
        "done": progress.done,
        "total": progress.total,
        "skipped": progress.skipped,
        "repeated": progress.repeated,
        "agreed": progress.agreed,
        "seconds": progress.seconds,
    }
    shown = session.show()
    if shown is not None:
        item, left, right = shown
        state["prompt"] = [{"role": visible(role), "text": visible(text)} for role, text in item.prompt]
        state |= {"left": visible(left), "left_length": len(left), "right": visible(right), "right_length": len(right)}
    return state


async def _read_body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent, which holds a `place`."""
    if int(request.headers.get("content-length", _BODY_LIMIT + 1)) > _BODY_LIMIT:
        raise HTTPException(413)
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise HTTPException(400, "expected JSON") from error
    if not isinstance(body, dict) or type(body.get("place")) is not int:
        raise HTTPException(400, "expected an object with the number of a place")
    return body


def _json(value: Any, status: int) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _constant(content: bytes, kind: str) -> Any:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return answer


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # The port of a run that just ended can be bound again at once.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) else "expected a number from 0 to 65535"
        raise UserError(f"--port {port}: {why}; 0 picks a free one") from error
    return listening


class _Guard:
    """Refuses whatever does not come from the page, before anything else sees it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        reason = self._refusal(scope)
        app = self._app if reason is None else PlainTextResponse(f"refused: {reason}\n", 403)
        await app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Any port: the page may be reached through a tunnel.
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", host):
            return "the Host is not this machine"
        if not secrets.compare_digest(scope["path"][1:].partition("/")[0].encode(), self._token.encode()):
            return "open the address that dpo-fast label printed at its last start"
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
            return "the Origin is not this page"
        return None
