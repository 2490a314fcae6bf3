"""Object storage behind the port Store: S3, Google Cloud Storage, Azure Blob Storage, by obstore.

Knows HTTP and its failures, nothing of what the objects mean. Asks once: `Retrying` asks again, and nobody else does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hotstart.errors import BadUsage, HotstartError
from hotstart.store.directory import DirectoryStore
from hotstart.store.port import Busy, Bytes, Missing, Store, check_key
from hotstart.store.retrying import Retrying

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig

_KINDS = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ADDRESS = {
    "s3": "AWS_ENDPOINT_URL, AWS_REGION and, for http://, AWS_ALLOW_HTTP=true",
    "gs": "the network",
    "az": "AZURE_STORAGE_ACCOUNT_NAME",
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_NETWORK = re.compile(r"HttpError \{\s*kind: (\w+)")
_METADATA = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")  # asked for credentials when there are none
# obstore 0.12 gives no header of a failure away, Retry-After among them (the object_store crate below it keeps status and body).
# What is left are servers and proxies that name a time in the body.
_RETRY_AFTER = re.compile(r"retry[ -]?after\D{0,20}?(\d{1,5})\b", re.IGNORECASE)
_CONNECT_S = 10.0
_STALL_S = 30.0  # nothing arrives for so long
_REQUEST_S = 600.0  # a pack of 64 MiB takes so long at 110 KiB/s


def open_store(url: str) -> Store:
    """Return the store at s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, file:///PATH or /PATH.

    Those on a network are asked again while they are busy. Nothing is asked yet. Raises BadUsage.
    """
    scheme, mark, rest = url.partition("://")
    if scheme in _KINDS and mark:
        return Retrying(ObjectStore(url))
    path = rest if scheme == "file" and mark else url
    if not os.path.isabs(path):
        raise BadUsage(f"{_shown(url)} names no store: write {_FORMS}")
    return DirectoryStore(os.path.normpath(path))


_FORMS = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or an absolute path"


class ObjectStore:
    """Objects below a prefix of one bucket. A write is one conditional PUT, never multipart: it is all or nothing at the server.

    Credentials and addresses come from the usual variables of the environment (docs/stores.md). `stall_s` is how long a silent
    server is waited for.
    """

    def __init__(self, url: str, stall_s: float = _STALL_S) -> None:
        import obstore

        self._scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.removesuffix("/")
        if self._scheme not in _KINDS or not _BUCKET.fullmatch(bucket) or not _is_key(prefix or "-"):
            raise BadUsage(f"{_shown(url)} names no store: write {_FORMS}")
        self._url = f"{self._scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
        self._root = f"{prefix}/" if prefix else ""
        self._obstore = obstore
        self._failures = (obstore.exceptions.BaseError, OSError)
        # A read's silence ends when bytes come. That of a write would be over only when all has been sent: it has no such limit.
        self._reader = self._connect(bucket, {"read_timeout": timedelta(seconds=stall_s)})
        self._writer = self._connect(bucket, {})

    def _connect(self, bucket: str, limits: ClientConfig) -> Any:
        import obstore.store

        options: ClientConfig = {
            # Options that are given take the place of all of those in the environment.
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1", "yes", "on"),
            "connect_timeout": timedelta(seconds=_CONNECT_S),
            "timeout": timedelta(seconds=_REQUEST_S),
            **limits,
        }
        try:
            return getattr(obstore.store, _KINDS[self._scheme])(
                bucket, client_options=options, retry_config={"max_retries": 0}
            )
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as e:
            raise BadUsage(
                f"{self._url} cannot be opened: check {_CREDENTIALS[self._scheme]}, {_ADDRESS[self._scheme]}"
            ) from e

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return an object's bytes, or `length` of them from `offset`. Raises Busy; what is not what was asked for is an error."""
        path = self._path(key)
        if length == 0:  # HTTP has no empty range
            return self.read(key, offset, 1)[:0]
        wanted: GetOptions = {"range": {"offset": offset} if length is None else (offset, offset + length)}
        whole = offset == 0 and length is None
        try:
            got = self._obstore.get(self._reader, path, options=None if whole else wanted)
            size, given = got.meta["size"], got.range
            data = got.bytes().to_bytes()
        except self._failures as e:
            if _status(e) == 416 and self._size(key) <= offset:
                return b""
            raise self._error(e, key) from e
        end = size if length is None else min(offset + length, size)
        if given != (offset, end) or len(data) != end - offset:
            raise HotstartError(f"{self._url} answered with other bytes of {key} than were asked for: {_PROXY}")
        return data

    def write(self, key: str, *parts: Bytes) -> bool:
        """Create an object of `parts` in a row; of several writers the server lets one through. Raises Busy."""
        path = self._path(key)
        try:
            self._obstore.put(self._writer, path, list(parts), mode="create", use_multipart=False)
        except self._failures as e:
            if not isinstance(e, self._obstore.exceptions.AlreadyExistsError):
                raise self._error(e) from e
            if self._scheme == "s3" and _status(e) == 409:  # S3: another write is under way, and may yet fail
                raise Busy(f"{key} is being written to {self._url} by another: try again") from e
            return False
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the keys that begin with `prefix` and their sizes, sorted. Raises Busy."""
        folder = self._root + prefix[: prefix.rfind("/") + 1]  # obstore knows prefixes of whole names only
        try:
            found = [
                (item["path"].removeprefix(self._root), item["size"])
                for batch in self._obstore.list(self._reader, folder or None, chunk_size=1000)
                for item in batch
            ]
        except self._failures as e:
            raise self._error(e) from e
        yield from sorted(item for item in found if item[0].startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine. Raises Busy."""
        path = self._path(key)
        with suppress(Missing):
            try:
                self._obstore.delete(self._reader, path)
            except self._failures as e:
                raise self._error(e, key) from e

    def _path(self, key: str) -> str:
        return self._root + check_key(key)

    def _size(self, key: str) -> int:
        try:
            return int(self._obstore.head(self._reader, self._path(key))["size"])
        except self._failures as e:
            raise self._error(e, key) from e

    def _error(self, error: Exception, key: str | None = None) -> HotstartError:
        """Say what a failure means and what to do. None of its own text gets into the message: it may quote the request."""
        text, status, url = str(error), _status(error), self._url
        code = f" ({found[1]})" if (found := _CODE.search(text)) else ""
        if _NO_BUCKET.search(text) or (status == 404 and key is None):
            return HotstartError(f"there is no bucket for {url}: create it, or correct the name")
        if isinstance(error, FileNotFoundError) and key is not None:
            return Missing(key)
        if _METADATA.search(text):
            return HotstartError(f"no credentials for {url}: set {_CREDENTIALS[self._scheme]}")
        if status in (401, 403) or "AccessDenied" in text:  # a refused delete is a success that says so in its body
            return HotstartError(
                f"{url} refuses access{code}: check {_CREDENTIALS[self._scheme]}, and what they permit"
            )
        if status in (408, 429) or (status or 0) >= 500 or "SlowDown" in text:
            hint = _RETRY_AFTER.search(text)
            return Busy(f"{url} is busy (HTTP {status or 200}): try again later", float(hint[1]) if hint else None)
        if network := _NETWORK.search(text):
            if network[1] == "Connect" or "BadScheme" in text:
                return HotstartError(f"{url} cannot be reached: check {_ADDRESS[self._scheme]}")
            return Busy(f"the connection to {url} broke off or was too slow: try again")
        if status in (301, 307, 400) or "configured region" in text:
            return HotstartError(f"{url} refuses the request{code}: check {_ADDRESS[self._scheme]}")
        if status:
            return HotstartError(f"{url} answered HTTP {status}{code}: {_PROXY}")
        return HotstartError(f"{url} gave an answer that is none: {_PROXY}")


_PROXY = "is it what its address says, without a proxy that changes answers?"


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _is_key(text: str) -> bool:
    try:
        return bool(check_key(text))
    except ValueError:
        return False


def _shown(url: str) -> str:
    """Return a URL as a message may show it: a wrong one may have been given a password."""
    return url if re.fullmatch(r"[A-Za-z0-9._:/-]{1,200}", url) and url.count(":") <= 1 else "that"
