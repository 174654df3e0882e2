"""app.py: who is answered, what is refused, and that a job's pictures are sample.py's own."""

import base64
import http.client
import io
import json
import socket
import threading
import time
import warnings
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import app
import sample
from common.files import write_json
from editing import jobs
from editing.edits_json import fill_polygon
from editing.segments import find_segments, outline, outlines
from tests.runs import GRADIENT, MEADOW, ROOT

SQUARE = {"polygon": [[20, 20], [60, 20], [60, 60], [20, 60]], "edits": [{"translate": [30, 5]}]}


class Client:
    def __init__(self, folder, *argv):
        self.argv = ["--folder", str(folder), "--port", "0", "--precision", "fp32", "--device", "cpu", *argv]
        self.server, self.address = app.make_server(app.parse(self.argv)[1])
        self.port = self.server.server_address[1]
        self.folder = folder
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, method, path, body=None, **headers):
        """-> status, headers, the body: an object if it is JSON"""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        data, kind = answer.read(), answer.headers["Content-Type"]
        connection.close()
        return answer.status, answer.headers, json.loads(data) if kind == "application/json" else data

    def post(self, path, body):
        return self.ask("POST", path, body)[2]

    def events(self):
        """The jobs that change, one after another"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/events")
        for line in connection.getresponse():
            if line.startswith(b"data:"):
                yield from json.loads(line[5:])

    def wait(self, name, *states):
        return next(job for job in self.events() if job["id"] == name and job["state"] in states)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = Client(tmp_path_factory.mktemp("gallery"))
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def meadow(client):
    return client.post("/pictures", open(MEADOW, "rb").read())["picture"]


def png(size=(8, 8), mode="L"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def form(**more):
    return {"steps": 3, "seed": 5, "sampler": "ddim", **more}


# ---------------------------------------------------------------------------------------------------------------------
# Who is answered


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"},
                                     {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
                                     {"Sec_Fetch_Site": "same-site"}])
def test_other_sites_get_nothing(client, headers):
    for method, path, body in (("GET", "/", None), ("GET", "/about", None), ("POST", "/scene", {"seed": 1})):
        status, _, said = client.ask(method, path, body, **headers)
        assert status == 403 and set(said) == {"error"}


def test_the_page_loads_nothing_from_elsewhere(client):
    origin = f"http://127.0.0.1:{client.port}"
    status, headers, page = client.ask("GET", "/", Origin=origin, Sec_Fetch_Site="same-origin")
    assert status == 200 and page == (ROOT / "app.html").read_bytes()
    assert b"http:" not in page and b"https:" not in page and b"src=\"//" not in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")


def test_another_machine_needs_the_token(tmp_path):
    made = Client(tmp_path, "--host", "0.0.0.0")
    try:
        assert made.ask("GET", "/about")[0] == made.ask("GET", "/?token=wrong")[0] == 403
        status, headers, _ = made.ask("GET", "/?" + made.address.partition("?")[2], Host="some.machine:1")
        cookie = headers["Set-Cookie"]
        assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert f"-{made.port}=" in cookie  # another port's program has another
        status, _, said = made.ask("GET", "http://[x?" + made.address.partition("?")[2], Host="x")
        assert status == 400 and set(said) == {"error"}
        assert made.ask("GET", "/about", Cookie=cookie.partition(";")[0])[0] == 200
        assert made.ask("GET", "/about", Cookie=cookie.partition(";")[0], Sec_Fetch_Site="cross-site")[0] == 403
    finally:
        made.server.shutdown()
        made.server.server_close()


def test_at_port_80_browsers_name_no_port(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "Server", made := mock.Mock(return_value=mock.Mock(server_address=("127.0.0.1", 80))))
    monkeypatch.setattr(app, "Studio", mock.Mock())
    app.make_server(app.parse([])[1])
    assert made.call_args.args[1].hosts == {"127.0.0.1", "127.0.0.1:80", "localhost", "localhost:80"}


def test_a_host_that_is_not_here():
    with pytest.raises(ValueError, match="choose another --host or --port"):
        app.make_server(app.parse(["--host", "192.0.2.1"])[1])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: one line, and the next request is served


@pytest.mark.parametrize("path", ["/../README.md", "/results/..%2f/job.json", "/results/../job.json", "/pictures/../x",
                                  "/pictures/%2e%2e%2fjob", "/results/20261127-080000-00000000/job.json"])
def test_a_path_leads_nowhere(client, path):
    status, _, said = client.ask("GET", path)
    assert status in (400, 404) and "no" in said["error"]


@pytest.mark.parametrize("path, body, why", [
    ("/pictures", b"", "no picture"), ("/pictures", b"%!PS-Adobe-3.0 EPSF", "no picture"),
    ("/pictures", open(MEADOW, "rb").read()[:500], "can be read"), ("/scene", b"{", "not JSON"),
    ("/scene", [], "object"), ("/scene", {"seed": "1"}, "whole number"),
    ("/segments", {"picture": "../x"}, "no longer"), ("/segments", {"picture": ["x"]}, "no longer"),
    ("/blur", {"map": "x", "softness": 1}, "data URL"),
    ("/blur", {"map": data_url(png()), "softness": float("nan")}, "0 .. 200"),
    ("/depth", {"picture": None}, "no longer"),
    ("/jobs", {"kind": ["map"]}, "a collage"), ("/jobs", {"kind": "map", "path": "/etc"}, "path"),
    ("/nothing", {}, "nothing here"),
])
def test_wrong_requests(client, path, body, why):
    status, _, said = client.ask("POST", path, body)
    assert status in (400, 404) and why in said["error"] and "\n" not in said["error"]


@pytest.mark.parametrize("change, why", [
    ({"parameters": form(steps=0)}, "1 .. 1000"), ({"parameters": form(steps="3")}, "whole number"),
    ({"parameters": form(steps=True)}, "whole number"), ({"parameters": form(samples=9)}, "1 .. 8"),
    ({"parameters": form(sampler=["ddim"])}, "sampler"), ({"parameters": form(prompt=3)}, "text"),
    ({"parameters": form(weights="/etc/passwd")}, "weights"),
    ({"parameters": form(guidance=1, negative="x")}, "guidance"),
    ({"parameters": None}, "object"), ({"map": data_url(png((4, 4)))}, "size"), ({"map": None}, "data URL"),
    ({"map": "data:image/png;base64,AAAA"}, "no picture"), ({"kind": "fan", "strengths": [0, 2]}, "0 .. 1"),
    ({"kind": "fan", "strengths": 5}, "strengths"), ({"kind": "collage", "segments": []}, "one segment"),
    ({"kind": "collage", "segments": [{"mask": "/etc/passwd"}]}, "mask"),
    ({"kind": "collage", "segments": [SQUARE | {"edits": [{"translate": [500, 0]}]}]}, "outside"),
])
def test_wrong_jobs(client, meadow, change, why):
    job = {"kind": "map", "picture": meadow, "map": data_url(png((128, 128))), "parameters": form()} | change
    if job["kind"] == "collage":
        job["parameters"] = form()
    status, _, said = client.ask("POST", "/jobs", job)
    assert status == 400 and why in said["error"]
    assert [path.name for path in client.folder.iterdir() if "-" in path.name] == []


@pytest.mark.parametrize("error, said", [(OSError(28, "full"), "[Errno 28] full"), (ValueError(), "ValueError"),
                                         (MemoryError(), "out of memory: a smaller picture may fit")])
def test_trouble_of_the_machine_is_one_line(client, monkeypatch, capsys, error, said):
    monkeypatch.setattr(client.server.RequestHandlerClass.studio, "draw_scene", mock.Mock(side_effect=error))
    assert client.ask("POST", "/scene", {"seed": 1})[::2] == (400, {"error": said})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_picture_of_100_megapixels_and_a_body_too_large(client, monkeypatch):
    assert "megapixels" in client.post("/pictures", png((10000, 10000), "1"))["error"]
    monkeypatch.setattr(app, "BODY", 1000)
    assert "larger than" in client.post("/pictures", b"x" * 3_000_000)["error"]


def test_a_picture_over_pillows_own_limit(client, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "64 megapixels" in client.post("/pictures", png())["error"]


def test_an_upload_that_breaks_off(client):
    with socket.create_connection(("127.0.0.1", client.port)) as s:
        s.sendall(f"POST /pictures HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nContent-Length: 9\r\n\r\nabc".encode())
        s.shutdown(socket.SHUT_WR)
        assert b"broke off" in s.makefile("rb").read()


@pytest.mark.slow
def test_a_large_picture_is_shrunk(client):
    assert client.post("/pictures", png((4096, 1024), "RGB")).items() >= {"width": 2048, "height": 512}.items()


# ---------------------------------------------------------------------------------------------------------------------
# Segments


def test_an_outline_has_just_the_pixels_of_its_mask():
    g = np.random.default_rng(0)
    for _ in range(60):
        mask = g.random(g.integers(1, 20, 2)) < g.random()
        mask[0, 0] = True
        assert (fill_polygon(mask.shape, outline(mask)) == mask).all()


def test_segments_are_the_things_in_the_picture():
    image = np.array(Image.open(MEADOW).convert("RGB"))
    labels = find_segments(image)
    for name in ("ball.png", "tree.png"):
        thing = np.asarray(Image.open(ROOT / "examples" / name).convert("L")) > 127
        best = max((labels == n)[thing].sum() / ((labels == n) | thing).sum() for n in range(labels.max() + 1))
        assert best > 0.75, name
    total = sum(fill_polygon(labels.shape, polygon).astype(int) for polygon in outlines(labels))
    assert (total == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def compare(client, tmp_path, job, *argv):
    """The job's pictures are, bit for bit, those of sample.py with these options."""
    folder = client.folder / job["id"]
    usual = ["--steps=3", "--seed=5", "--precision=fp32", "--device=cpu", f"--out={tmp_path / 'out.png'}"]
    sample.main([*usual, *argv])
    assert len(job["pictures"]) == len(list(tmp_path.glob("out*.png")))
    for name in job["pictures"]:
        theirs, ours = (np.asarray(Image.open(path / name)) for path in (folder, tmp_path))
        assert np.array_equal(theirs, ours)


@pytest.mark.slow
def test_a_map_gives_what_sample_gives(client, meadow, tmp_path):
    said = {"kind": "map", "picture": meadow, "map": data_url(open(GRADIENT, "rb").read()),
            "parameters": form(prompt="--snow", negative="")}
    job = client.wait(client.post("/jobs", said)["id"], "done", "failed")
    assert "starts" in job["notes"][0] or "start at" in job["notes"][0]  # 3 steps are few: a warning
    compare(client, tmp_path, job, "--image", MEADOW, "--change-map", GRADIENT, "--prompt=--snow")


@pytest.mark.slow
def test_a_collage_gives_what_sample_gives_and_survives_a_restart(client, meadow, tmp_path):
    coarse = client.post("/coarse", {"picture": meadow, "segments": [SQUARE]})
    said = {"kind": "collage", "picture": meadow, "segments": [SQUARE], "parameters": form(samples=2)}
    job = client.wait(client.post("/jobs", said)["id"], "done", "failed")
    files = client.folder / job["id"]
    compare(client, tmp_path, job, "--collage", str(files / "edits.json"), "--samples=2")
    assert client.ask("GET", f"/results/{job['id']}/coarse.png")[2] == coarse

    # Another program on a copy of the folder: what has no job.json is what was interrupted
    (client.folder / "20200101-000000-00000000").mkdir()
    again = app.Studio(app.parse(client.argv)[1], None).jobs.all
    assert list(again) == [p.name for p in sorted(client.folder.iterdir()) if "-" in p.name and p.name[:4] != "2020"]
    was = again[job["id"]].describe()
    assert all(was[name] == job[name] for name in ("kind", "parameters", "state", "pictures", "notes", "command"))


@pytest.mark.slow
def test_a_job_that_is_cancelled_ends_and_the_next_one_runs(client, meadow):
    said = {"kind": "fan", "picture": meadow, "strengths": [0.5, 1.0], "parameters": form(steps=1000)}
    first, second = (client.post("/jobs", said)["id"] for _ in range(2))
    running = client.wait(first, "running")
    seen = next(job for job in client.events() if job["id"] == first and job["step"] > 1)  # then the page is closed
    assert running["steps"] in (0, 1000) and seen["pictures"][0].startswith("data:image/png;base64,")
    for name in (second, first):
        assert client.ask("POST", "/cancel", {"id": name})[0] == 200
        client.wait(name, "cancelled")
    end = time.monotonic() + 60
    while (client.folder / first).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not (client.folder / first).exists() and not (client.folder / second).exists()
    said["parameters"] = form(steps=10)
    assert client.wait(client.post("/jobs", said)["id"], "done", "failed")["state"] == "done"


def test_jobs_whose_folders_are_deleted(tmp_path):
    """While one waits, and while one runs: both are cancelled, and the next one runs."""
    begun, gone = threading.Event(), threading.Event()

    def run(job, watch):
        if job.id == "next":
            raise TypeError("a bug")
        begun.set()
        gone.wait(10)
        watch(1, 2, list)

    made = jobs.Jobs(tmp_path, run)
    for name in ("runs", "waits", "next"):
        made.add(jobs.Job(name, "map", {}, []))
    begun.wait(10)
    for name in ("waits", "runs"):
        made.cancel(name)
    gone.set()
    seen = lambda: [job.state for job in made.all.values()]  # noqa: E731
    with made.changes:
        assert made.changes.wait_for(lambda: seen()[2] == "failed", 10)
    assert seen() == ["cancelled", "cancelled", "failed"] and "a bug" in made.all["next"].notes[0]


def test_a_warning_is_a_note_of_the_edit_that_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "usual_warning", elsewhere := mock.Mock())

    def run(job, watch):
        upload = threading.Thread(target=lambda: warnings.warn("of an upload", stacklevel=1))
        upload.start()
        upload.join()
        warnings.warn("of the edit", stacklevel=1)

    made = jobs.Jobs(tmp_path, run)
    made.add(jobs.Job("one", "map", {}, ["--prompt=snow"]))
    with made.changes:
        assert made.changes.wait_for(lambda: made.all["one"].state == "done", 10)
    assert made.all["one"].notes == ["of the edit"] and str(elsewhere.call_args.args[0]) == "of an upload"


def test_a_file_that_is_named_like_a_result_stays(tmp_path):
    file = tmp_path / "20200101-000000-00000000"
    file.write_text("mine")
    assert not jobs.Jobs(tmp_path, None).all and file.read_text() == "mine"


@pytest.mark.parametrize("argv, parameters", [([1], {}), (None, {}), (3, {}), ([], None), ([], {"steps": "3"})])
def test_a_senseless_result_is_left_out(tmp_path, capsys, argv, parameters):
    folder = tmp_path / "20200101-000000-00000000"
    write_json(folder / "job.json", {"kind": "map", "parameters": parameters, "argv": argv})
    assert not jobs.Jobs(tmp_path, None).all and f"{folder} is left out" in capsys.readouterr().out


def test_who_cancels_waits_for_nobody(client):
    with client.server.RequestHandlerClass.studio.busy:
        assert client.ask("POST", "/cancel", {"id": "none"})[0] == 200


def test_the_folder_of_networks_is_told_to_a_job(tmp_path):
    made = Client(tmp_path, "--networks", str(tmp_path), "--weights", str(tmp_path / "sd"))
    try:
        picture = made.post("/pictures", open(MEADOW, "rb").read())["picture"]
        said = {"kind": "fan", "picture": picture, "strengths": [0.5, 1.0], "parameters": form(prompt="auto")}
        job = made.wait(made.post("/jobs", said)["id"], "failed")
        assert f"--networks={tmp_path}" in job["argv"] and f"none is in {tmp_path}" in job["notes"][0]
    finally:
        made.server.shutdown()
        made.server.server_close()


@pytest.mark.slow
def test_fifty_at_once(client, meadow):
    found = []
    threads = [threading.Thread(target=lambda: found.append(client.ask("POST", "/coarse", {
        "picture": meadow, "segments": [SQUARE]})[0])) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 50
