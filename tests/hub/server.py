"""A Hub on loopback: enough of the Hub's protocol for huggingface_hub's own client, with faults on demand.

Clients must have HF_ENDPOINT and HF_HUB_DISABLE_XET=1 set before they import huggingface_hub. Repositories are kept
under a root: blobs/ by sha256, a json file for each commit, and one of refs for each repository. Without the token
nothing is written and nothing private is read.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

TOKEN = "hf_planted_by_the_tests"  # it must be found nowhere
LFS_PATTERN = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|onnx|parquet|arrow|zip|gz|npz|h5|gguf|model|msgpack)$")
LFS_THRESHOLD = 10 * 1024 * 1024  # like the real Hub: any file over 10 MiB goes to LFS
PLURAL = {"models": "model", "datasets": "dataset", "spaces": "space"}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status = status
        self.message = message
        self.code = code


class Store:
    """Repos as chains of commits; a commit is {path: {oid, size, sha256, lfs}}."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.lock = threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    def blob(self, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HubError(400, "bad oid")
        return self.root / "blobs" / sha256

    def dir(self, kind: str, repo: str) -> Path:
        return self.root / kind / repo.replace("/", "--")

    def refs(self, kind: str, repo: str) -> dict:
        file = self.dir(kind, repo) / "refs.json"
        if not file.exists():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return json.loads(file.read_text())

    def save_refs(self, kind, repo, refs):
        (self.dir(kind, repo) / "refs.json").write_text(json.dumps(refs))

    def create(self, kind: str, repo: str, private: bool) -> bool:
        with self.lock:
            folder = self.dir(kind, repo)
            if folder.exists():
                return False
            folder.mkdir(parents=True)
            self.save_refs(kind, repo, {"branches": {}, "tags": {}, "private": private, "createdAt": now()})
            data = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.commit(kind, repo, "main", "initial commit", "", {".gitattributes": self.put(data)}, first=True)
            return True

    def forget_contents(self) -> None:
        """Of all files: what is pushed next is new to this server. Repositories that exist cannot be read any more."""
        for blob in (self.root / "blobs").iterdir():
            blob.unlink()

    def put(self, data: bytes) -> dict:
        sha = hashlib.sha256(data).hexdigest()
        self.blob(sha).write_bytes(data)
        return {"oid": git_blob_sha1(data), "size": len(data), "sha256": sha, "lfs": False}

    def sha(self, kind: str, repo: str, rev: str | None) -> str:
        refs = self.refs(kind, repo)
        rev = rev or "main"
        for known in (refs["branches"], refs["tags"]):
            if rev in known:
                return known[rev]
        if re.fullmatch(r"[0-9a-f]{40}", rev) and (self.dir(kind, repo) / f"{rev}.json").exists():
            return rev
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def load(self, kind, repo, rev) -> dict:
        return json.loads((self.dir(kind, repo) / f"{self.sha(kind, repo, rev)}.json").read_text())

    def commit(self, kind, repo, branch, title, body, files, parent=None, first=False) -> str:
        with self.lock:
            if not first and branch not in self.refs(kind, repo)["branches"]:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            doc = {
                "title": title,
                "message": body,
                "date": now(),
                "files": files,
                "parent": None if first else self.sha(kind, repo, branch),
            }
            if parent and doc["parent"] and parent != doc["parent"]:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            doc["id"] = hashlib.sha1((json.dumps(doc, sort_keys=True) + str(time.time_ns())).encode()).hexdigest()
            (self.dir(kind, repo) / f"{doc['id']}.json").write_text(json.dumps(doc))
            refs = self.refs(kind, repo)
            refs["branches"][branch] = doc["id"]
            self.save_refs(kind, repo, refs)
            return doc["id"]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_model_index(value: object) -> bool:
    return all(
        _is_text(model["name"])
        and all(
            _is_text(result["task"]["type"])
            and _is_text(result["dataset"]["type"])
            and _is_text(result["dataset"]["name"])
            and all(_is_text(m["type"]) and isinstance(m["value"], (int, float)) for m in result["metrics"])
            for result in model["results"]
        )
        for model in value
    )


CARD_RULES = {  # https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    "language": lambda v: all(re.fullmatch("[a-z]{2,3}|multilingual", one) for one in ([v] if _is_text(v) else v)),
    "license": lambda v: re.fullmatch(r"[a-z0-9.+-]+", v),
    "library_name": lambda v: v == "transformers",
    "pipeline_tag": lambda v: v == "text-classification",
    "tags": _are_texts,
    "metrics": _are_texts,
    "datasets": lambda v: _are_texts(v) and all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in v),
    "base_model": lambda v: re.fullmatch(r"[\w.-]+/[\w.-]+", v),
    "model-index": _is_model_index,
}


def card_errors(data: dict) -> list[str]:
    """What the Hub would refuse in the metadata of a model's card. Those of Spaces have other keys."""
    wrong = []
    for key, rule in CARD_RULES.items():
        try:
            fine = key not in data or rule(data[key])
        except (TypeError, KeyError, ValueError):
            fine = False
        if not fine:
            wrong.append(f"{key}: {data[key]!r}")
    return wrong


async def _breaks_off():
    yield b"{"
    raise ConnectionResetError("on purpose")


async def _cut_off(request: Request):
    """Goes away in the middle of what the client sends."""
    await anext(request.stream())
    return StreamingResponse(_breaks_off(), headers={"Content-Length": "1000"})


def _flip_a_byte(request: Request) -> None:
    """The rest of the request meets other bytes than were sent."""
    receive, flipped = request._receive, []

    async def flipping():
        message = await receive()
        if message.get("body") and not flipped:
            flipped.append(True)
            message = {**message, "body": bytes([message["body"][0] ^ 1]) + message["body"][1:]}
        return message

    request._receive = flipping


async def _slowly(response: Response) -> StreamingResponse:
    """The same answer, late and in small pieces."""

    async def pieces():
        async for part in response.body_iterator:
            for start in range(0, len(part), 1 + len(part) // 20):
                await asyncio.sleep(0.01)
                yield part[start : start + 1 + len(part) // 20]

    await asyncio.sleep(0.1)
    return StreamingResponse(pieces(), response.status_code, response.headers)


FAULTS = {
    "500": lambda: JSONResponse({"error": "on purpose"}, 500),
    "429": lambda: JSONResponse({"error": "too many requests, on purpose"}, 429, {"Retry-After": "0"}),
    "401": lambda: JSONResponse({"error": "the token has expired, on purpose"}, 401),
    "dropped": lambda: StreamingResponse(_breaks_off(), headers={"Content-Length": "1000"}),
}


def make_app(root: str | Path, token: str = TOKEN, user: str = "tester") -> FastAPI:
    """The application. `app.state.log` lists (method, path, query) of the requests; `app.state.faults` maps the number
    of a request, counted from 0 since the log was last emptied, to the name of the fault that it meets."""
    store = Store(Path(root))
    app = FastAPI()
    app.state.store = store
    app.state.log = []
    app.state.faults = {}

    @app.middleware("http")
    async def record(request: Request, call_next):
        fault = app.state.faults.pop(len(app.state.log), None)
        app.state.log.append((request.method, request.url.path, request.url.query))
        if fault == "slow":
            return await _slowly(await call_next(request))
        if fault == "corrupted":
            _flip_a_byte(request)
        elif fault == "cut_off":
            return await _cut_off(request)
        elif fault is not None:
            await request.body()
            return FAULTS[fault]()
        return await call_next(request)

    @app.exception_handler(HubError)
    async def on_error(_, exc: HubError):
        headers = {"X-Error-Message": exc.message} | ({"X-Error-Code": exc.code} if exc.code else {})
        return JSONResponse({"error": exc.message}, exc.status, headers)

    def authed(request: Request):
        if request.headers.get("authorization") != f"Bearer {token}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def readable(kind: str, repo: str, request: Request):
        """Like the Hub, it does not reveal that a private repository exists."""
        if store.refs(kind, repo)["private"] and request.headers.get("authorization") != f"Bearer {token}":
            raise HubError(401, "Repository not found", "RepoNotFound")

    def base(request: Request) -> str:
        return str(request.base_url).rstrip("/")

    def named_repo(body: dict) -> tuple[str, str]:
        return body.get("type") or "model", f"{body.get('organization') or user}/{body['name']}"

    def lfs_meta(f: dict) -> dict:
        return {"lfs": {"oid": f["sha256"], "size": f["size"], "pointerSize": 134}} if f["lfs"] else {}

    def tree_entry(path, f):
        return {"type": "file", "path": path, "size": f["size"], "oid": f["oid"]} | lfs_meta(f)

    # ---- users and repos ----
    @app.get("/api/whoami-v2")
    def whoami(request: Request):
        authed(request)
        return {
            "type": "user",
            "id": "0",
            "name": user,
            "fullname": user,
            "email": None,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}},
        }

    @app.post("/api/repos/create")
    async def create_repo(request: Request):
        authed(request)
        body = await request.json()
        kind, repo = named_repo(body)
        prefix = "" if kind == "model" else kind + "s/"
        url = f"{base(request)}/{prefix}{repo}"
        fresh = store.create(kind, repo, body.get("visibility") == "private")
        extra = {} if fresh else {"error": "You already created this model repo"}
        return JSONResponse({"url": url, "name": repo, "id": repo} | extra, 200 if fresh else 409)

    @app.delete("/api/repos/delete")
    async def delete_repo(request: Request):
        authed(request)
        body = await request.json()
        kind, repo = named_repo(body)
        store.refs(kind, repo)
        shutil.rmtree(store.dir(kind, repo))
        return {}

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request):
        content = (await request.json())["content"]
        m = re.match(r"^---\n(.*?)\n---", content, re.S)
        try:
            data = yaml.safe_load(m.group(1)) if m else {}
        except yaml.YAMLError as e:
            return JSONResponse({"errors": [{"message": str(e)}], "warnings": []}, 400)
        if found := [{"message": message} for message in card_errors(data)]:
            return JSONResponse({"errors": found, "warnings": []}, 400)
        return {"errors": [], "warnings": [], "metadata": json.loads(json.dumps(data, default=str))}

    @app.get("/api/{kinds}")
    def list_repos(kinds: str, request: Request):
        if kinds not in PLURAL:  # the hf command line asks for one more list here; 404 is fine
            raise HubError(404, "Not found")
        folders = sorted((store.root / PLURAL[kinds]).glob("*"))
        return [info(kinds, *folder.name.split("--", 1), "main", request) for folder in folders]

    # ---- info, tree, refs ----
    @app.get("/api/{kinds}/{ns}/{name}/revision/{rev:path}")
    def info(kinds: str, ns: str, name: str, rev: str, request: Request):
        kind, repo = PLURAL[kinds], f"{ns}/{name}"
        readable(kind, repo, request)
        c = store.load(kind, repo, rev)
        refs = store.refs(kind, repo)
        card = {}
        if readme := c["files"].get("README.md"):
            m = re.match(r"^---\n(.*?)\n---", store.blob(readme["sha256"]).read_text(), re.S)
            card = json.loads(json.dumps((yaml.safe_load(m.group(1)) if m else {}) or {}, default=str))
        siblings = []
        for path, f in sorted(c["files"].items()):
            row = {"rfilename": path}
            if request.query_params.get("blobs"):
                row |= {"size": f["size"], "blobId": f["oid"]}
                if f["lfs"]:
                    row["lfs"] = {"sha256": f["sha256"], "size": f["size"], "pointerSize": 134}
            siblings.append(row)
        return {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": ns,
            "sha": c["id"],
            "lastModified": c["date"],
            "createdAt": refs["createdAt"],
            "private": refs["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "siblings": siblings,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
        }

    @app.get("/api/{kinds}/{ns}/{name}/refs")
    def refs(kinds: str, ns: str, name: str):
        r = store.refs(PLURAL[kinds], f"{ns}/{name}")

        def rows(prefix, group):
            return [{"name": k, "ref": prefix + k, "targetCommit": v} for k, v in group.items()]

        return {
            "branches": rows("refs/heads/", r["branches"]),
            "tags": rows("refs/tags/", r["tags"]),
            "converts": [],
        }

    @app.get("/api/{kinds}/{ns}/{name}/commits/{rev:path}")
    def commits(kinds: str, ns: str, name: str, rev: str, request: Request):
        readable(PLURAL[kinds], f"{ns}/{name}", request)
        out = []
        at = rev
        while at:
            c = store.load(PLURAL[kinds], f"{ns}/{name}", at)
            out.append(
                {
                    "id": c["id"],
                    "title": c["title"],
                    "message": c["message"],
                    "date": c["date"],
                    "authors": [{"user": user}],
                }
            )
            at = c["parent"]
        return out

    @app.delete("/api/{kinds}/{ns}/{name}/branch/{ref:path}")
    def delete_branch(kinds: str, ns: str, name: str, ref: str, request: Request):
        authed(request)
        with store.lock:
            refs = store.refs(PLURAL[kinds], f"{ns}/{name}")
            del refs["branches"][ref]
            store.save_refs(PLURAL[kinds], f"{ns}/{name}", refs)
        return {}

    @app.post("/api/{kinds}/{ns}/{name}/{what}/{ref:path}")
    async def post_ref(kinds: str, ns: str, name: str, what: str, ref: str, request: Request):
        kind, repo = PLURAL[kinds], f"{ns}/{name}"
        if what == "paths-info":
            form = "json" not in request.headers.get("content-type", "")  # the client sends an urlencoded form
            wanted = parse_qs((await request.body()).decode())["paths"] if form else (await request.json())["paths"]
            return [tree_entry(p, f) for p, f in store.load(kind, repo, ref)["files"].items() if p in wanted]
        authed(request)
        if what == "preupload":
            return await preupload(kind, repo, ref, request)
        if what == "commit":
            return await commit(kind, repo, ref, request)
        if what not in ("branch", "tag"):
            raise HubError(404, "Not found")
        body = await request.json()
        group = {"branch": "branches", "tag": "tags"}[what]
        with store.lock:
            r = store.refs(kind, repo)
            # create_branch: url names the branch, body.startingPoint the revision; create_tag: the reverse
            new, at = (ref, body.get("startingPoint")) if what == "branch" else (body["tag"], ref)
            if new in r[group]:
                return JSONResponse({"error": f"Reference already exists: {new}"}, 409)
            r[group][new] = store.sha(kind, repo, at)
            store.save_refs(kind, repo, r)
        return {}

    async def preupload(kind, repo, rev, request: Request):
        files = store.load(kind, repo, rev)["files"]
        out = []
        for f in (await request.json())["files"]:
            lfs = f["size"] > LFS_THRESHOLD or bool(LFS_PATTERN.search(f["path"]))
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": files.get(f["path"], {}).get("sha256" if lfs else "oid"),
                }
            )
        return {"files": out}

    async def commit(kind, repo, rev, request: Request):
        lines = [json.loads(x) for x in (await request.body()).splitlines() if x.strip()]
        head = next(x["value"] for x in lines if x["key"] == "header")
        pull_request = None
        with store.lock:
            if request.query_params.get("create_pr") in ("1", "true", "True"):
                refs = store.refs(kind, repo)
                number = 1 + sum(name.startswith("refs/pr/") for name in refs["branches"])
                pull_request = f"refs/pr/{number}"
                refs["branches"][pull_request] = store.sha(kind, repo, rev)
                store.save_refs(kind, repo, refs)
                rev = pull_request
            files = dict(store.load(kind, repo, rev)["files"])
            for key, v in ((x["key"], x["value"]) for x in lines):
                if key == "file":
                    files[v["path"]] = store.put(base64.b64decode(v["content"]))
                elif key == "lfsFile":
                    blob = store.blob(v["oid"])
                    if not blob.exists():
                        raise HubError(400, f"LFS object {v['oid']} was not uploaded")
                    pointer = (
                        f"version https://git-lfs.github.com/spec/v1\noid sha256:{v['oid']}\n"
                        f"size {blob.stat().st_size}\n"
                    ).encode()
                    files[v["path"]] = {
                        "oid": git_blob_sha1(pointer),
                        "size": blob.stat().st_size,
                        "sha256": v["oid"],
                        "lfs": True,
                    }
                elif key == "deletedFile":
                    files.pop(v["path"], None)
                elif key == "deletedFolder":
                    files = {p: f for p, f in files.items() if not p.startswith(v["path"].rstrip("/") + "/")}
            oid = store.commit(
                kind, repo, rev, head["summary"], head.get("description", ""), files, head.get("parentCommit")
            )
        prefix = "" if kind == "model" else kind + "s/"
        url = f"{base(request)}/{prefix}{repo}/commit/{oid}"
        made = {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
        if pull_request:
            made["pullRequestUrl"] = f"{base(request)}/{prefix}{repo}/discussions/{pull_request.split('/')[-1]}"
        return made

    @app.get("/api/{kinds}/{ns}/{name}/tree/{rest:path}")
    def tree(kinds: str, ns: str, name: str, rest: str, request: Request, recursive: str = "false"):
        kind, repo = PLURAL[kinds], f"{ns}/{name}"
        readable(kind, repo, request)
        rev, _, folder = rest.partition("/")
        files = store.load(kind, repo, rev)["files"]
        pre = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = {p: f for p, f in files.items() if p.startswith(pre)}
        if pre and not inside:
            raise HubError(404, f'{folder} does not exist on "{rev}"', "EntryNotFound")
        deep = recursive.lower() in ("true", "1")
        out = []
        seen = set()
        for p, f in sorted(inside.items()):
            parts = p[len(pre) :].split("/")
            for i in range(1, len(parts) if deep else min(len(parts), 2)):
                d = pre + "/".join(parts[:i])
                if d not in seen:
                    seen.add(d)
                    out.append({"type": "directory", "path": d, "size": 0, "oid": hashlib.sha1(d.encode()).hexdigest()})
            if deep or len(parts) == 1:
                out.append(tree_entry(p, f))
        return out

    @app.get("/api/{kinds}/{ns}/{name}")
    def info_main(kinds: str, ns: str, name: str, request: Request):
        return info(kinds, ns, name, "main", request)

    # ---- LFS ----
    @app.post("/{repo:path}.git/info/lfs/objects/batch")
    async def lfs_batch(repo: str, request: Request):
        authed(request)
        out = []
        for o in (await request.json())["objects"]:
            obj = {"oid": o["oid"], "size": o["size"], "authenticated": True}
            if not store.blob(o["oid"]).exists():  # no "actions": the client skips the upload
                obj["actions"] = {
                    "upload": {"href": f"{base(request)}/lfs/{o['oid']}"},
                    "verify": {"href": f"{base(request)}/lfs/{o['oid']}/verify"},
                }
            out.append(obj)
        return JSONResponse({"transfer": "basic", "objects": out}, media_type="application/vnd.git-lfs+json")

    @app.put("/lfs/{oid}")
    async def lfs_put(oid: str, request: Request):
        tmp = store.blob(oid).with_suffix(f".{time.time_ns()}.part")
        h = hashlib.sha256()
        with tmp.open("wb") as f:
            async for chunk in request.stream():
                h.update(chunk)
                f.write(chunk)
        if h.hexdigest() != oid:
            tmp.unlink()
            raise HubError(400, "sha256 mismatch")
        tmp.rename(store.blob(oid))
        return Response(status_code=200)

    @app.post("/lfs/{oid}/verify")
    async def lfs_verify(oid: str):
        return Response(status_code=200 if store.blob(oid).exists() else 404)

    # ---- downloads: /NS/NAME/resolve/REV/PATH, /datasets/NS/NAME/resolve/REV/PATH ----
    @app.api_route("/{where:path}/resolve/{rest:path}", methods=["GET", "HEAD"])
    def resolve(where: str, rest: str, request: Request):
        parts = where.split("/")
        if parts[0] in PLURAL:
            kind, repo = PLURAL[parts[0]], "/".join(parts[1:])
        else:
            kind, repo = "model", where
        rev, _, path = rest.partition("/")
        readable(kind, repo, request)
        c = store.load(kind, repo, rev)
        if path not in c["files"]:
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": c["id"],
            }
            return JSONResponse({"error": "Entry not found"}, 404, headers)
        f = c["files"][path]
        etag = f["sha256"] if f["lfs"] else f["oid"]
        headers = {"X-Repo-Commit": c["id"], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if f["lfs"]:
            headers |= {"X-Linked-Size": str(f["size"]), "X-Linked-Etag": f'"{f["sha256"]}"'}
        return FileResponse(store.blob(f["sha256"]), headers=headers, media_type="application/octet-stream")

    return app


def serve_in_thread(root, port: int = 0, **kw):
    """Start the server on 127.0.0.1 in a daemon thread; returns (endpoint, server, app)."""
    app = make_app(root, **kw)
    sock = socket.socket()
    sock.bind(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return f"http://127.0.0.1:{sock.getsockname()[1]}", server, app
