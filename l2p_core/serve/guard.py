"""What stands before every request: the key, the host, the origin, the size of a request."""

import hmac
import json
from collections.abc import Awaitable, Callable
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

COOKIE = "l2p_session"
OPEN = ("/health", "/login")  # paths that need no key
DRAINED = 4  # times the limit: how much of a body is discarded before the answer
LOCAL = ("localhost", "127.0.0.1", "::1")
POLICY = (  # nothing is loaded from other hosts
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline';"
    " script-src 'self'{scripts}; worker-src 'self' blob:; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'; object-src 'none'"
)
DOCUMENTATION = ("/docs", "/redoc")  # FastAPI's pages, which hold their script themselves
LOGIN = """<!doctype html><html><head><meta charset="utf-8"><title>L2P</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px system-ui;display:grid;place-items:center;height:90vh}}
input,button{{font:inherit;padding:.5em}}</style></head><body>
<form method="post" action="/login"><p>{message}</p>
<input type="password" name="key" placeholder="API key" aria-label="API key" autofocus>
<button>OK</button></form></body></html>"""


class TooLarge(Exception):
    """A request's body is larger than the limit."""


class Guard:
    """ASGI middleware.

    key: what a client must show, as `Authorization: Bearer KEY` or, after /login, in a cookie; None
    where none is asked for. local: serve only requests to this machine's own names, so that a web
    page elsewhere can't reach a server without a key through a name of its own. max_body: bytes."""

    def __init__(self, app: Any, key: str | None, local: bool, max_body: int):
        self.app, self.key, self.local, self.max_body = app, key, local, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        problem = self._problem(scope, headers)
        if problem:
            await drain(receive, DRAINED * self.max_body)
            return await answer(send, *problem)
        if self.key and scope["path"] == "/login":
            return await self._login(scope, receive, send)
        if self.key and scope["path"] not in OPEN and not self._known(headers):
            if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                return await answer_html(send, 401, LOGIN.format(message="L2P"))
            return await answer(send, 401, "no valid API key; send Authorization: Bearer KEY")
        await self._pass(scope, receive, send)

    def _problem(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and message for a request from the wrong place, or of too many bytes."""
        host = headers.get("host", "")
        if self.local and host_name(host) not in LOCAL:
            return 403, f"host {host!r} is not this machine; open http://127.0.0.1"
        origin = headers.get("origin")
        if origin and scope["method"] != "GET" and not is_same_place(origin, host):
            return 403, "requests from other web sites are not served"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            return 413, f"the request has {length} bytes; expected at most {self.max_body}"
        return None

    def _known(self, headers: dict[str, str]) -> bool:
        assert self.key
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), self.key):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same(cookie.value, session(self.key))

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.key
        if scope["method"] != "POST":
            return await answer_html(send, 200, LOGIN.format(message="L2P"))
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body") or len(body) > 4096:
                break
        given = parse_qs(body[:4096].decode("latin-1")).get("key", [""])[0]
        if not same(given, self.key):
            return await answer_html(send, 401, LOGIN.format(message="Wrong key / 密钥错误"))
        cookie = f"{COOKIE}={session(self.key)}; Path=/; HttpOnly; SameSite=Strict"
        await answer_html(send, 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())])

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, count the bytes it reads, and add the headers."""
        read, started = 0, False

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise TooLarge
            return message

        async def protected(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                if read > self.max_body:  # the app answers in its own way that its body broke off
                    raise TooLarge
                started = True
                inline = scope["path"] in DOCUMENTATION
                message["headers"] = [*message.get("headers", []), *safe_headers(inline)]
            await send(message)

        try:
            await self.app(scope, counted, protected)
        except TooLarge:
            if not started:
                await drain(receive, DRAINED * self.max_body)
                await answer(send, 413, f"the request has more than {self.max_body} bytes")


def safe_headers(inline_scripts: bool = False) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell a browser what a page may do."""
    policy = POLICY.format(scripts=" 'unsafe-inline'" if inline_scripts else "")
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"same-origin"),  # "no-referrer" hides the login form's origin too
        (b"cache-control", b"no-cache"),
    ]


def same(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def session(key: str) -> str:
    """The cookie's value: from the key, but not the key."""
    return hmac.new(key.encode(), b"l2p page", sha256).hexdigest()


def is_same_place(origin: str, host: str) -> bool:
    """Whether an Origin header names the host that the request goes to."""
    return origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())


def host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None where it is damaged."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def error_body(message: str, status: int, param: str | None = None) -> dict:
    """An error as OpenAI's API words it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def drain(receive: Receive, most: int) -> None:
    """Throw a request's body away, so that a client that is still sending reads the answer."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def answer(send: Send, status: int, message: str) -> None:
    """Answer with an error."""
    body = json.dumps(error_body(message, status)).encode()
    headers = [(b"content-type", b"application/json"), *safe_headers()]
    await _respond(send, status, body, headers)


async def answer_html(send: Send, status: int, text: str, headers: list = []) -> None:
    """Answer with a page."""
    headers = [(b"content-type", b"text/html; charset=utf-8"), *safe_headers(), *headers]
    await _respond(send, status, text.encode(), headers)


async def _respond(send: Send, status: int, body: bytes, headers: list) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
