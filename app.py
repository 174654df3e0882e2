"""Both papers by hand, in a browser: move a photo's parts, or paint where and how much it changes.

    python app.py                        then open the address that it prints
    python app.py --host 0.0.0.0         for another machine: the address has a token in it

The page, app.html, makes an edits.json or a change map. sample.py does the rest, by the options of
its command line, so that the same command gives the same picture again. One edit runs at a time;
what goes in and what comes out is kept in --folder. Without --weights and --magic-fixup the toy
models run.

A page of another site gets no answer: `Handler.refuse` looks at Host, Origin and Sec-Fetch-Site.
What our page names is an identifier, never a path.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("app.py")

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import socket
import traceback
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from PIL import Image

import sample
from common.cli import Parser, explain, file_name, folder_name, number, report_errors, tell
from common.files import check_writable, lock_folder
from editing import options, uploads
from editing.studio import Studio
from kernels.memory import hold_memory

BODY = 2**25  # bytes of a request
PAGE = Path(__file__).with_name("app.html")


def make_runner():
    """-> run(job, watch): sample.py with the job's options. Each model is read once."""
    models = {}

    def run(job, watch):
        def load(args, dtype, device):
            key = str(args.weights)
            if key not in models:
                models[key] = sample.load_model(args, dtype, device)
            return models[key]

        def show(step, steps, t, x0):
            model = models[str(args.weights)]
            watch(step, steps, lambda: [model.decode(z)[0] / 2 + 0.5 for z in x0.split(1)])

        args = options.parse(job.argv, "")[1]
        sample.run(args, load, show)

    return run


# -------------------------------------------------------------------------------------------------
# Requests


class Handler(BaseHTTPRequestHandler):
    """One request. `serve` sets what belongs to all: the studio, the page, who may ask."""

    timeout = 60  # seconds without a byte: an upload that was cut off ends
    studio = page = rules = hosts = token = cookie = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, respond):
        try:
            why = self.refuse()
            self.send({"error": why}, 403) if why else respond()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the page is gone
        except Exception as e:
            line = explain(e, "a smaller picture may fit")
            if line is None:
                traceback.print_exc()
            why = line or f"app.py failed, its terminal says why: {e!r}"
            self.send({"error": why}, 500 if line is None else 400)

    def refuse(self):
        """-> why this sender gets nothing; None: it is our page, or a person who opens it"""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.hosts and host not in self.hosts:
            return f"{host!r} is not this program's address: open the one that it has printed"
        site = self.headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none") or origin not in (None, f"http://{host}"):
            return "this came from the page of another site"
        if self.token and not self.has_token():
            return "the token is missing: open the address that app.py has printed"

    def has_token(self):
        """In the address that was printed, or afterwards in a cookie"""
        query = parse_qs(self.path.partition("?")[2]).get("token", [""])[0]
        kept = re.search(rf"{self.cookie}=([\w-]+)", self.headers.get("Cookie", ""))
        given = kept[1] if kept and not query else query
        return hmac.compare_digest(given.encode(), self.token.encode())

    def get(self):
        path = urlsplit(self.path).path
        match path.strip("/").split("/"):
            case [""]:
                self.send(self.page, kind="text/html; charset=utf-8")
            case ["about"]:
                self.send(self.studio.about())
            case ["events"]:
                self.stream()
            case ["pictures", name]:
                self.send(self.studio.path_of(name).read_bytes(), kind="image/png")
            case ["results", job, name]:
                file = self.studio.jobs.path_of(job, name)
                kind = "image/png" if file.suffix == ".png" else "application/json"
                self.send(file.read_bytes(), kind=kind)
            case _:
                self.send({"error": "there is nothing here"}, 404)

    def post(self):
        studio, body = self.studio, self.read_body()
        path = urlsplit(self.path).path
        if path == "/pictures":
            with studio.busy:
                self.send(studio.add_picture(uploads.read_picture(body)))
            return
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("this is not JSON") from None
        if not isinstance(said, dict):
            raise ValueError("a request is an object {...}")

        def picture():
            return studio.path_of(said.get("picture"))

        actions = {
            "/scene": lambda: studio.draw_scene(said.get("seed")),
            "/segments": lambda: {"polygons": studio.find_polygons(picture())},
            "/coarse": lambda: studio.make_coarse(said.get("picture"), said.get("segments")),
            "/depth": lambda: studio.find_depth(picture()),
            "/blur": lambda: studio.blur(said.get("map"), said.get("softness")),
            "/jobs": lambda: {"id": studio.submit(said)},
            "/cancel": lambda: {"cancelled": studio.jobs.cancel(said.get("id"))},
        }
        if path not in actions:
            return self.send({"error": "there is nothing here"}, 404)
        # Who cancels waits for nobody: the jobs have a lock of their own
        with contextlib.nullcontext() if path == "/cancel" else studio.busy:
            made = actions[path]()
        self.send(made)

    def read_body(self):
        """-> bytes. ValueError for too many, or fewer than were announced."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise ValueError("a request says its length")
        if int(length) > BODY:
            for _ in range(min(int(length), 2**29) // 2**20):  # or the sender never hears of it
                self.rfile.read(2**20)
            raise ValueError(f"this is larger than {BODY >> 20} MB: save it smaller")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ValueError("this broke off before its end")
        return body

    def stream(self):
        """Server-sent events: all jobs, and from then on each that changes"""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        seen = 0
        while True:
            seen, changed = self.studio.jobs.news(seen, patience=15)
            # Without news a comment: it finds out whether the page is still there.
            self.wfile.write(f"data: {json.dumps(changed)}\n\n".encode() if changed else b":\n\n")

    def send(self, body, status=200, kind="application/json"):
        """body  bytes; a picture, sent as PNG; or what becomes JSON"""
        if isinstance(body, Image.Image):
            body, kind = uploads.to_png(body), "image/png"
        elif not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.rules.items():
            self.send_header(name, value)
        if self.token and self.has_token():
            self.send_header("Set-Cookie", f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a page may ask for many pictures at once

    def handle_error(self, request, address):
        pass  # a connection that ended before its request did


def make_server(args):
    """-> Server, that is not serving yet, and its address for a person"""
    page = PAGE.read_bytes()
    script = re.search(rb"<script>(.*?)</script>", page, re.S)[1]
    digest = b64encode(hashlib.sha256(script).digest()).decode()
    rules = {
        "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{digest}'; "
        "style-src 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
    }
    handler = type("Handler", (Handler,), {"page": page, "rules": rules})
    try:
        server = Server((args.host or "127.0.0.1", args.port), handler)
    except OSError as e:
        raise ValueError(f"{args.host or '127.0.0.1'}:{args.port} cannot be used ({e.strerror}): "
                         f"choose another {'--host or ' if args.host else ''}--port") from None
    port = server.server_address[1]
    handler.cookie = f"app-token-{port}"  # a browser sends one machine's cookies to all its ports
    if args.host:
        handler.token = secrets.token_urlsafe()
        name = socket.gethostname() if args.host == "0.0.0.0" else args.host
        address = f"http://{name}:{port}/?token={handler.token}"
    else:
        ends = [":80", ""] if port == 80 else [f":{port}"]  # browsers leave 80 out
        handler.hosts = {name + end for name in ("127.0.0.1", "localhost") for end in ends}
        address = f"http://127.0.0.1:{port}/"
    handler.studio = Studio(args, make_runner())
    return server, address


def parse(argv):
    """-> the parser, the options"""
    parser = Parser(prog="app.py", description=__doc__)
    add = parser.add_argument
    add("--folder", type=folder_name, default=Path("gallery"), help="of pictures and results "
        "(default: gallery)")
    add("--weights", type=file_name, help="for change maps, as sample.py's (default: the toy)")
    add("--magic-fixup", type=file_name, help="weights for collages (default: the toy)")
    add("--networks", type=file_name, help="folder of SAM's and MiDaS's files (default: weights)")
    add("--host", type=file_name, help="an address of this machine, or 0.0.0.0 for all (default: "
        "127.0.0.1, which other machines cannot reach); who has the printed token may use the page")
    add("--port", type=number(int, 0, 65535), default=8000, help="0 = any (default: 8000)")
    add("--device", help="auto, cpu, cuda, mps")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"])
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse(argv)
    kept = f"finished results are in {args.folder}, and the page shows them again"
    with report_errors(parser, "use smaller weights", kept):
        check_writable(args.folder)
        with lock_folder(args.folder):
            server, address = make_server(args)
            tell(f"app.py: open {address}")
            try:
                server.serve_forever()
            finally:
                server.RequestHandlerClass.studio.jobs.stop()


if __name__ == "__main__":
    hold_memory()
    main()
