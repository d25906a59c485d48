"""An OpenAI-compatible server whose answers a test decides, on a thread with an event loop of its own.

Run as a program, it answers every request after a while: `stub_server.py PORT_FILE MILLISECONDS`.
"""

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

HANG = "hang"
CLOSE = "close"


def completion(*texts, finish_reason="stop", tokens=7):
    """What a server answers with these texts as its choices."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": tokens * len(texts)}}


class StubServer:
    """What it received, and how it answers.

    Attributes:
        requests: the requests as `(path, body, headers)` in order of arrival.
        answered: for each body (as JSON), how often a completion was sent back for it.
        most_at_once: the most requests that were in flight at once.
        answer: takes the body of a request and its number, and returns the answer's JSON, `(status, JSON or bytes,
            headers)`, `HANG` or `CLOSE`. By default the last message's content, `n` times.
        delay: seconds before an answer.
        hold_until: no request is answered before there are this many.
        times: when each request arrived, on the monotonic clock.
    """

    def __init__(self, answer=None, delay=0.0, keep=True):
        self.requests = []
        self.answered = Counter()
        self.in_flight = self.most_at_once = 0
        self.num_requests = 0
        self.answer = answer or echo
        self.delay = delay
        self.keep = keep
        self.hold_until = 0
        self.times = []

    async def serve(self, reader, writer):
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                content = await reader.readexactly(int(headers["content-length"]))
                if not await self.respond(writer, path, json.loads(content), headers):
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def respond(self, writer, path, body, headers):
        """Answer one request; false if the connection is to be closed."""
        number = self.num_requests
        self.num_requests += 1
        if self.keep:
            self.requests.append((path, body, headers))
            self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_at_once = max(self.most_at_once, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
            while self.num_requests < self.hold_until:
                await asyncio.sleep(0.001)
            found = self.answer(body, number)
            if found == HANG:
                await asyncio.sleep(3600)
            if found == CLOSE:
                return False
            status, answer, more = found if isinstance(found, tuple) else (200, found, {})
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            head = f"HTTP/1.1 {status} Stub\r\ncontent-length: {len(content)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in more.items())
            writer.write(head.encode() + b"\r\n" + content)
            await writer.drain()
            if status == 200 and self.keep:
                self.answered[json.dumps(body, sort_keys=True)] += 1
            return True
        finally:
            self.in_flight -= 1


def echo(body, number):
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return completion(*[f"{text} {i}" if i else text for i in range(body.get("n", 1))])


@contextmanager
def stub_server(answer=None, delay=0.0, port=0):
    """A running `StubServer`, with its address as `url`."""
    stub = StubServer(answer, delay)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    tasks = set()

    def run():
        asyncio.set_event_loop(loop)

        async def start():
            async def serve(reader, writer):
                tasks.add(asyncio.current_task())
                await stub.serve(reader, writer)

            server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=512)
            stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            return server

        server = loop.run_until_complete(start())
        # Only now: a stop that came earlier would end the call above.
        loop.call_soon(ready.set)
        loop.run_forever()
        server.close()
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def main(port_file, milliseconds):
    stub = StubServer(delay=float(milliseconds) / 1000, keep=False)

    async def serve():
        server = await asyncio.start_server(stub.serve, "127.0.0.1", 0, backlog=512)
        Path(port_file).write_text(str(server.sockets[0].getsockname()[1]))
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
