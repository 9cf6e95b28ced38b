"""A small Hugging Face Hub on the loopback address, and how to run commands that are logged in to it.

It speaks what huggingface_hub 2.4 and datasets 5.2 say when `HF_ENDPOINT` is the server's `url`:

    POST      /api/repos/create                           a repository, with the Hub's own first commit
    POST      /api/validate-yaml                          a README.md is refused if its base_model is no Hub name
    POST      /api/<type>s/<repository>/preupload/<rev>   every file is to be sent in the commit: no LFS, no Xet
    POST      /api/<type>s/<repository>/commit/<rev>      JSON lines: a header, then files in base64
    GET       /api/<type>s/<repository>[/revision/<rev>]  its sha, whether it is private, its files
    GET       /api/<type>s/<repository>/tree/<rev>[/...]  files and folders
    POST      /api/<type>s/<repository>/paths-info/<rev>  the same for the paths asked for
    GET, HEAD /[<type>s/]<repository>/resolve/<rev>/...   a whole file, with ETag and X-Repo-Commit
    GET       /api/whoami-v2                              the owner of the token

and its refusals, which X-Error-Code tells apart: an unknown or private repository (404, without a token 401), a gated
one (403, without a token 401), an unknown revision or file (404). The token `hub.token` is that of "someone" and opens
everything; any other token opens what is neither private nor gated. All else is answered 501 and kept in
`hub.unanswered`.

The libraries read HF_ENDPOINT when they are imported, so each command runs in a process of its own, with an environment
of its own.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from conftest import REPOSITORY, TOKEN

OWNER = "someone"

_REPOSITORY = r"(?P<name>[^/]+(?:/[^/]+)?)"
_API = re.compile(
    rf"/api/(?P<kind>model|dataset)s/{_REPOSITORY}(?:/(?P<action>[\w-]+)/(?P<revision>[^/]+)(?P<path>/.*)?)?"
)
_RESOLVE = re.compile(rf"/(?:(?P<kind>dataset)s/)?{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Request(NamedTuple):
    """A request as it came: `path` with its query, `authorization` as the header holds it or None."""

    method: str
    path: str
    authorization: str | None


class Commit(NamedTuple):
    """A commit: `files` is {path: bytes} of all files after it."""

    oid: str
    summary: str
    files: dict


@dataclass
class Repository:
    """A repository with its commits, the Hub's own first one included. Only a private or gated one asks for a token."""

    private: bool = False
    gated: bool = False
    parameters: int | None = None  # what the Hub found in a model's safetensors files
    commits: list = field(default_factory=list)

    def add_commit(self, files, summary=""):
        """Append a commit after which the repository holds `files`, and return it."""
        parent = self.commits[-1].oid if self.commits else ""
        content = json.dumps([parent, summary, {path: git_oid(files[path]) for path in sorted(files)}])
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), summary, files))
        return self.commits[-1]

    def find(self, revision):
        """Return the commit that `revision` (main or an oid) means, or None."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Answer:
    """What a request is answered with; status 0 closes the connection without a word.

    For answers sent in place of the right one: `read` is the share of the request's body that is read before the
    connection is closed, and with `done` what was asked for is done first, so that only the word of it is lost.
    """

    status: int = 200
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    read: float = 1.0
    done: bool = False


def json_answer(value, status=200):
    """Return an Answer that holds `value` as JSON."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status, code, message):
    """Return an Answer as the Hub words its refusals."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), headers)


def git_oid(content):
    """Return the git object id of a file, which is its ETag too."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server, running inside `with HubServer() as hub`.

    `repositories` is {("model" or "dataset", "owner/name"): Repository}. `requests` are all requests so far. A function
    in `failures` is called with each Request and may return an Answer that is sent in place of the right one.
    """

    def __init__(self):
        self.token = "hf_" + "x" * 34
        self.repositories = {}
        self.requests = []
        self.unanswered = []
        self.failures = []

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, kind, name, files=None, *, private=False, gated=False):
        """Make a repository as the Hub does, with a second commit of `files` ({path: bytes}) if there are any."""
        repository = self.repositories[kind, name] = Repository(private, gated)
        repository.add_commit({".gitattributes": b""}, "initial commit")
        if files:
            repository.add_commit({".gitattributes": b"", **files})
        return repository

    def answer(self, request, body):
        """Return the Answer to a request."""
        path = unquote(urlsplit(request.path).path)
        known = request.authorization == f"Bearer {self.token}"
        if path == "/api/whoami-v2":
            return json_answer({"type": "user", "name": OWNER, "orgs": []}) if known else refusal(401, None, "Who?")
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if known else _not_allowed(request)
        if path == "/api/validate-yaml":
            return _validate_card(json.loads(body)["content"])
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None:
            return self._unanswered(request)
        repository = self.repositories.get((match["kind"] or "model", match["name"]))
        if repository is None or (repository.private and not known):
            return refusal(404 if request.authorization else 401, "RepoNotFound", "Repository not found")
        commit = repository.find(match["revision"] or "main")
        if commit is None:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        if match.re is _RESOLVE:
            if repository.gated and not known:
                message = f"Access to {match['name']} is restricted."
                return refusal(403 if request.authorization else 401, "GatedRepo", message)
            return _resolve(commit, match["path"])
        action = match["action"]
        if action in ("preupload", "commit"):
            if not known:
                return _not_allowed(request)
            page = self._page(match["kind"], match["name"])
            return _preupload(commit, body) if action == "preupload" else _commit(repository, page, body)
        if action == "tree":
            recursive = "recursive=true" in urlsplit(request.path).query.lower()
            return _tree(commit, (match["path"] or "").strip("/"), recursive)
        if action == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            return json_answer([entry for path in paths if (entry := _entry(commit, path.strip("/")))])
        if action in (None, "revision"):
            return json_answer(
                {
                    "id": match["name"],
                    "sha": commit.oid,
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "siblings": [{"rfilename": path} for path in commit.files],
                    "safetensors": repository.parameters and {"parameters": {}, "total": repository.parameters},
                }
            )
        return self._unanswered(request)

    def _unanswered(self, request):
        self.unanswered.append(request)
        return refusal(501, None, "not part of this server")

    def _page(self, kind, name):
        return f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"

    def _create(self, fields):
        kind, owner = fields.get("type") or "model", fields.get("organization") or OWNER
        name = f"{owner}/{fields['name']}"
        if owner != OWNER:
            return refusal(403, None, f"{OWNER} has no right to create anything under {owner}.")
        if (kind, name) in self.repositories:
            return json_answer({"error": f"{name} exists", "url": self._page(kind, name)}, 409)
        self.add_repository(kind, name, private=fields.get("visibility") == "private")
        return json_answer({"url": self._page(kind, name), "name": name, "id": name})


def _not_allowed(request):
    if request.authorization is None:
        return refusal(401, None, "Invalid username or password.")
    return refusal(403, None, "This token has no right to write here.")


def _commit(repository, page, body):
    files, summary = dict(repository.commits[-1].files), ""
    for line in body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            summary = value["summary"]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            return refusal(501, None, f"{key} is not part of this server")
    oid = repository.add_commit(files, summary).oid
    return json_answer({"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"})


def _validate_card(content):
    base_model = re.search(r"^base_model: *['\"]?(.+?)['\"]?$", content.split("\n---", 1)[0], re.MULTILINE)
    if base_model is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model[1]):
        return json_answer({"errors": [], "warnings": []})
    message = f'"base_model" with value "{base_model[1]}" is not valid. Use a Hub model id.'
    return json_answer({"errors": [{"message": message}], "warnings": []}, 400)


def _preupload(commit, body):
    paths = [file["path"] for file in json.loads(body)["files"]]
    present = {path: {"oid": git_oid(commit.files[path])} for path in paths if path in commit.files}
    mode = {"uploadMode": "regular", "shouldIgnore": False}
    return json_answer({"files": [{"path": path} | mode | present.get(path, {}) for path in paths]})


def _entry(commit, path):
    """Return what the Hub tells of a file or a folder, or None where there is none."""
    if path in commit.files:
        content = commit.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if any(file.startswith(f"{path}/") for file in commit.files):
        return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
    return None


def _tree(commit, folder, recursive):
    """Return the entries below `folder` ("" is the root), only those right below it unless `recursive`."""
    root = PurePosixPath(folder)
    files = map(PurePosixPath, commit.files)
    below = {path for file in files for path in (file, *file.parents) if root in path.parents}
    if not below:
        return refusal(404, "EntryNotFound", f"{folder} does not exist")
    return json_answer([_entry(commit, str(path)) for path in sorted(below) if recursive or path.parent == root])


def _resolve(commit, path):
    if path not in commit.files:
        return refusal(404, "EntryNotFound", "Entry not found")
    content = commit.files[path]
    return Answer(200, content, {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": commit.oid})


def start(hub, command, cwd, **changes):
    """Start `command` in `cwd` with nothing cached and logged in, except for `changes` of the environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "HF_HOME": str(cwd / "huggingface"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(REPOSITORY),  # for python -c
    }
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment | changes,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(process):
    """Wait for a process and return (exit code, stdout, stderr); no output may hold a token."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert not TOKEN.search(stdout + stderr)
    return process.returncode, stdout, stderr


def run(hub, command, cwd):
    """Run a command that must succeed and return its stdout."""
    code, stdout, stderr = finish(start(hub, command, cwd))
    assert code == 0, stdout + stderr
    return stdout


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self):
        hub = self.server.hub
        request = Request(self.command, self.path, self.headers.get("Authorization"))
        hub.requests.append(request)
        answer = next((answer for fail in hub.failures if (answer := fail(request))), None)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(int(size * answer.read) if answer else size)
        if answer is None or answer.done:
            right_answer = hub.answer(request, body)
            answer = answer or right_answer
        if answer.status == 0 or answer.read < 1:
            self.close_connection = True
        if answer.status == 0:
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = _handle

    def log_message(self, *_):
        """Print nothing: pytest shows what the tests say."""
