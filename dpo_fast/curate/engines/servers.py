"""OpenAI-compatible servers that share the work: load, rate limit, retries.

A failure of the server (it is gone, overloaded or says `Retry-After`) pauses that server for all requests; after the
pause one request tries it, and the others follow once that succeeds. A failure of a request (500, no answer in time,
not the expected JSON) delays only that request, which prefers another server next time.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dpo_fast.config import ServerConfig
from dpo_fast.curate.verdict import describe, shorten
from dpo_fast.errors import TrainingError, UserError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

logger = logging.getLogger("dpo_fast")

T = TypeVar("T")
# Settings that change no answer: an interrupted run may be resumed with others.
NEUTRAL_SETTINGS = (
    "base_url",
    "judge_base_url",
    "api_key_env",
    "judge_api_key_env",
    "concurrency",
    "max_requests_per_minute",
    "max_retries",
    "request_timeout",
)
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
_CONNECT_TIMEOUT = 10.0
# A busy server may turn a request down this many times as often as `--max_retries` before the command stops.
_PATIENCE = 10
_SERVER_IS_BUSY_OR_GONE = {429, 502, 503, 504}
_WORTH_A_RETRY = {408, 409, 425}
_WRONG_SETTINGS = {
    401: "check the API key in the environment variable {key}",
    403: "check the API key in the environment variable {key}",
    404: "check the base URL, which usually ends in /v1, and the model's name",
    405: "check the base URL, which usually ends in /v1",
}


class EngineError(TrainingError):
    """Servers failed for too long; what they answered before is kept."""


class NotFound(UserError):
    """A server has no such route or model."""


class Refused(Exception):
    """A server rejects this request and would do so again; the message says why."""


class _Failure(Exception):
    """A request failed and may be repeated.

    Attributes:
        of_server: other requests to the same server would fail as well.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(self, message: str, *, of_server: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.of_server = of_server or retry_after is not None
        self.retry_after = retry_after


@dataclass(eq=False)
class _Server:
    """One address.

    Attributes:
        url: without a slash at the end.
        in_flight: requests that it has not answered.
        failures: times in a row that it was found to be busy or gone.
        paused_until: when it may be asked again, on the monotonic clock.
    """

    url: str
    in_flight: int = 0
    failures: int = 0
    paused_until: float = 0.0

    def is_ready(self, now: float) -> bool:
        return now >= self.paused_until and (self.failures == 0 or self.in_flight == 0)


class Servers:
    """Sends requests from any number of threads.

    Attributes:
        num_requests: requests sent, retries included.
    """

    def __init__(self, base_url: str | list[str], config: ServerConfig, *, api_key_env: str | None = None) -> None:
        """Check the settings; nothing is sent yet.

        Raises:
            UserError: urllib3 is not installed, or a setting cannot work.
        """
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        self._servers = [_Server(_checked_url(url)) for url in urls]
        if not self._servers:
            raise UserError("no server given: pass --base_url with its address, such as http://localhost:8000/v1")
        self._config = config
        self._key_name = api_key_env or config.api_key_env
        self._key = os.environ.get(self._key_name, "").strip()
        self._pools = {server.url: _pool(server.url, config) for server in self._servers}
        self._interval = 60 / config.max_requests_per_minute if config.max_requests_per_minute else 0.0
        self._next_start = 0.0
        self._changed = threading.Condition()
        self.num_requests = 0

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T], *, at_root: bool = False) -> T:
        """Ask until there is an answer.

        Args:
            path: such as `/chat/completions`.
            body: what is sent as JSON, with `request_options` on top.
            read: takes what it needs from the answer's JSON. What it cannot read is asked for again: it may raise
                `ValueError`, `LookupError`, `TypeError` or `AttributeError`.
            at_root: `path` starts at the server's root, not below `/v1`.

        Raises:
            Refused: the server rejects this request.
            EngineError: it failed too often.
            UserError: the key, the address or the model's name is wrong.
        """
        fields = body | (self._config.request_options or {})
        content = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        own_failures, server_failures = 0, 0
        failed_at: _Server | None = None
        while True:
            server = self._acquire(avoid=failed_at)
            try:
                result = read(self._send(server, path, content, at_root))
            except (UserError, Refused):
                self._release(server)
                raise
            except (_Failure, ValueError, LookupError, TypeError, AttributeError) as error:
                failure = error if isinstance(error, _Failure) else _Failure(f"not the expected answer: {error!r}")
                self._fail(server, failure)
                own_failures += not failure.of_server
                server_failures += failure.of_server
                if self._is_hopeless(own_failures, server_failures):
                    raise EngineError(self._epitaph(server, failure, own_failures + server_failures)) from error
                if not failure.of_server:
                    time.sleep(_delay(own_failures - 1))
                failed_at = server
            else:
                self._succeed(server)
                return result

    def _acquire(self, *, avoid: _Server | None) -> _Server:
        """Wait until a request may start; returns the server to send it to, the least busy one."""
        with self._changed:
            while True:
                now = time.monotonic()
                ready = [server for server in self._servers if server.is_ready(now)]
                if ready and now >= self._next_start:
                    break
                pauses = [s.paused_until - now for s in self._servers if s.paused_until > now]
                waits = [self._next_start - now] if ready else pauses
                self._changed.wait(max(min(waits, default=1.0), 0.001))
            self._next_start = now + self._interval
            server = min(ready, key=lambda server: (server is avoid, server.in_flight))
            server.in_flight += 1
            self.num_requests += 1
            return server

    def _send(self, server: _Server, path: str, content: bytes, at_root: bool) -> Any:
        """The JSON of one answer."""
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError

        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        url = (server.url.removesuffix("/v1") if at_root else server.url) + path
        try:
            response = self._pools[server.url].request("POST", url, body=content, headers=headers)
        except ReadTimeoutError as error:
            raise _Failure(f"no answer within {self._config.request_timeout:g} s (--request_timeout)") from error
        except (NewConnectionError, ConnectTimeoutError) as error:
            raise _Failure(f"cannot be reached: {_cause(error)}", of_server=True) from error
        except HTTPError as error:
            raise _Failure(f"the connection broke: {_cause(error)}") from error
        if response.status == 200:
            return json.loads(response.data)
        return self._explain(server, response)

    def _explain(self, server: _Server, response: BaseHTTPResponse) -> Any:
        """Raise what a status other than 200 means."""
        status = response.status
        reason = self._without_key(f"HTTP {status}: {_message(response.data)}")
        if status in _SERVER_IS_BUSY_OR_GONE or status >= 500 or status in _WORTH_A_RETRY:
            raise _Failure(reason, of_server=status in _SERVER_IS_BUSY_OR_GONE, retry_after=_retry_after(response))
        if status in _WRONG_SETTINGS or status < 400:
            cure = _WRONG_SETTINGS.get(status, _WRONG_SETTINGS[405]).format(key=self._key_name)
            raise (NotFound if status == 404 else UserError)(f"{server.url}: {reason}: {cure}")
        raise Refused(reason)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _release(self, server: _Server) -> None:
        with self._changed:
            server.in_flight -= 1
            self._changed.notify_all()

    def _succeed(self, server: _Server) -> None:
        with self._changed:
            server.in_flight -= 1
            if server.failures:
                server.failures = 0
                self._changed.notify_all()

    def _fail(self, server: _Server, failure: _Failure) -> None:
        with self._changed:
            server.in_flight -= 1
            now = time.monotonic()
            if failure.of_server:
                # Requests that were in flight when the pause began add nothing to it, unless they were told to.
                pause = failure.retry_after
                if now >= server.paused_until:
                    server.failures += 1
                    pause = _delay(server.failures - 1) if pause is None else pause
                    logger.warning("%s: %s; next try in %.1f s", server.url, shorten(str(failure)), pause)
                server.paused_until = max(server.paused_until, now + (pause or 0.0))
            self._changed.notify_all()

    def _is_hopeless(self, own_failures: int, server_failures: int) -> bool:
        """Whether a request has failed too often, or all servers have been gone for too long.

        A busy server may turn the same request down many times while it answers others.
        """
        retries = self._config.max_retries
        with self._changed:
            all_are_gone = all(server.failures > retries for server in self._servers)
        return all_are_gone or own_failures > retries or server_failures > _PATIENCE * (retries + 1)

    def _epitaph(self, server: _Server, failure: _Failure, attempts: int) -> str:
        failures = max(attempts, server.failures)
        return self._without_key(f"{server.url}: {shorten(str(failure))} (failed {failures} times in a row)")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not url:
        raise UserError("no server given: pass --base_url with its address, such as http://localhost:8000/v1")
    if not is_url or parts.query or parts.fragment:
        raise UserError(f"--base_url {url}: expected an address such as http://localhost:8000/v1")
    if parts.username is not None:
        raise UserError(
            "--base_url: expected an address without a user name; the key belongs in an environment variable "
            "(--api_key_env)"
        )
    return url.rstrip("/")


def _pool(url: str, config: ServerConfig) -> PoolManager:
    """Connections to one server, through the proxy that the environment names for it."""
    try:
        from urllib3 import PoolManager, ProxyManager, Timeout
    except ImportError as error:
        raise UserError("urllib3 is not installed: pip install 'dpo-fast[engines]'") from error
    options: dict[str, Any] = {
        "maxsize": config.concurrency,
        "retries": False,
        "timeout": Timeout(connect=_CONNECT_TIMEOUT, read=config.request_timeout),
    }
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.netloc):
        return ProxyManager(proxy, **options)
    return PoolManager(**options)


def _delay(failures: int) -> float:
    """Seconds to wait after this many failures before; spread, so that requests do not come back all at once."""
    return min(FIRST_DELAY * 2**failures, LONGEST_DELAY) * random.uniform(0.75, 1.25)


def _retry_after(response: BaseHTTPResponse) -> float | None:
    """What the header `Retry-After` asks for, in seconds; it may hold a number or a date."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().get_retry_after(response)
    except (InvalidHeader, ValueError, OverflowError):
        return None


def _message(content: bytes) -> str:
    """What an answer says about an error, in one line."""
    try:
        error = json.loads(content)
        error = error.get("error", error.get("detail", error)) if isinstance(error, dict) else error
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        text = content[:1000].decode(errors="replace")
    return shorten(text) or "no reason given"


def _cause(error: BaseException) -> str:
    """The system's own words where there are some; urllib3 wraps them in its objects' addresses."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return shorten(describe(error))
