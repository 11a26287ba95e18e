"""Objects on S3, on a web server and in a folder: the same interface, with every fault of the wire."""

import functools
import http.server
import io
import os
import threading
import time
from dataclasses import replace

import pytest
from distill.core.errors import DistillError, OutOfReach, UserError
from distill.core.storage import RetryPolicy, open_store, split_url
from distill.core.storage import objects as objects_module
from distill.core.storage import s3 as s3_module
from distill.core.storage.refusals import CredentialsRejected
from distill.core.storage.s3 import S3Access
from support.faulty_proxy import Fault, FaultyProxy
from support.s3_server import QUICK, SECRET, s3, s3_server  # noqa: F401

ODD = ["a b.jpg", "100%.jpg", "a#b?c.jpg", "émoji😀.jpg", "x//y.jpg", "a+b&c=d.jpg", "~t.jpg", "a%20b.jpg", "tab\t.jpg",
       "[x].jpg", "back\\slash.jpg", "*.jpg", "'quoted'.jpg"]  # fmt: skip


@pytest.fixture
def store(s3):  # noqa: F811
    return open_store(f"s3://{s3.bucket('remote')}/pre", access=s3.access(), retry=QUICK)


@pytest.fixture
def proxy(s3):  # noqa: F811
    with FaultyProxy(s3.port) as proxy:
        yield proxy


@pytest.fixture
def through(s3, proxy):  # noqa: F811
    """A store behind the faulty proxy."""
    bucket = s3.bucket("remote")
    return open_store(f"s3://{bucket}/pre", access=s3.access(endpoint=proxy.endpoint), retry=QUICK)


# -- the interface ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_listed(s3, store):  # noqa: F811
    for key in ODD:
        store.write(key, key.encode())
    s3.put("remote", "prefix-of-another", b"x")
    s3.put("remote", "pre/folder/", b"")
    assert [entry.key for entry in store.list()] == sorted(ODD)
    for entry in store.list():
        assert store.read(entry.key) == entry.key.encode()
        assert store.stat(entry.key) == entry
    assert [entry.key for entry in store.list("a")] == sorted(key for key in ODD if key.startswith("a"))
    store.delete("a b.jpg")
    store.delete("a b.jpg")
    assert not store.exists("a b.jpg")
    assert store.exists("100%.jpg")


def test_a_listing_comes_in_pages(store, monkeypatch):
    monkeypatch.setattr(s3_module, "PAGE", 7)
    for number in range(20):
        store.write(f"{number:03d}", b"")
    assert [entry.key for entry in store.list()] == [f"{number:03d}" for number in range(20)]


def test_versions_change_with_the_content(store):
    store.write("a", b"one")
    before = store.stat("a").version
    store.write("a", b"two")
    assert before
    assert store.stat("a").version not in ("", before)


def test_large_objects_go_in_parts(s3, store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(objects_module, "PART_BYTES", 5 << 20)
    data = os.urandom((12 << 20) + 17)
    store.write("big", data)
    assert "-" in store.stat("big").version  # the ETag of an object of several parts
    assert s3.get("remote", "pre/big") == data
    assert store.read("big") == data
    assert store.read_range("big", 3, len(data)) == data[3:]
    with store.open("big") as stream:
        assert stream.read() == data
    (tmp_path / "file").write_bytes(data)
    store.upload("uploaded", tmp_path / "file")
    assert s3.get("remote", "pre/uploaded") == data


def test_a_stream_fetches_what_is_read_of_it(s3, through, proxy):  # noqa: F811
    data = os.urandom(3 << 20)
    through.write("a", data)
    with through.open("a") as stream:
        assert stream.read(16) == data[:16]
        assert stream.read(20000) == data[16:20016]
        assert proxy.count("GET") == 1
        stream.seek(-100, io.SEEK_END)
        assert stream.read() == data[-100:]
        stream.seek(1 << 20)
        assert stream.read(10) == data[1 << 20 : (1 << 20) + 10]
        stream.seek(0)
        assert stream.read(5) == data[:5]
        assert proxy.count("GET") == 3
    before = proxy.count("GET")
    with through.open("a") as stream:
        parts = iter(lambda: stream.read(8192), b"")
        assert b"".join(parts) == data
    assert proxy.count("GET") - before < 10


def test_ranges_at_the_ends(store):
    store.write("a", b"0123456789")
    assert store.read_range("a", 8, 100) == b"89"
    assert store.read_range("a", 10, 5) == b""
    store.write("empty", b"")
    with store.open("empty") as stream:
        assert stream.read() == b""


@pytest.mark.parametrize("place", ["folder", "file-url"])
def test_a_folder_is_a_store(tmp_path, place):
    url = str(tmp_path) if place == "folder" else tmp_path.as_uri()
    folder = open_store(url)
    for key in ("b/c", "b.txt", "a"):
        folder.write(key, key.encode())
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert [entry.key for entry in folder.list()] == ["a", "b.txt", "b/c"]
    assert [entry.key for entry in folder.list("b/")] == ["b/c"]
    assert folder.read_range("b/c", 1, 1) == b"/"
    folder.delete("a")
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_a_web_server_is_read(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(bytes(range(256)) * 1000)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with FaultyProxy(server.server_address[1]) as proxy:
            web = open_store(f"http://name:{SECRET.replace('/', '%2F')}@127.0.0.1:{proxy.port}/", retry=QUICK)
            data = (tmp_path / "a b.jpg").read_bytes()
            assert web.read("a b.jpg") == web.read("a%20b.jpg?signature=secret") == data
            assert web.stat("a b.jpg").size == len(data)
            assert web.read_range("a b.jpg", 10, 5) == data[10:15]  # the server sends all of it
            proxy.fault(Fault("truncate", keep=1000))
            assert web.read("a b.jpg") == data
            assert not web.exists("b.jpg")
            proxy.fault(Fault("status", status=500), times=99)
            with pytest.raises(OutOfReach) as caught:
                web.read("a b.jpg?signature=secret")
            assert "secret" not in str(caught.value)
            with pytest.raises(UserError, match="cannot be listed"):
                list(web.list())
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/tables/a.csv", ("s3://bucket/tables", "a.csv")),
        ("s3://bucket/a.csv", ("s3://bucket", "a.csv")),
        ("https://host/x/a.csv?key=a/b", ("https://host/x", "a.csv?key=a/b")),
        ("/data/a.csv", ("/data", "a.csv")),
        ("file:///data/a%20b.csv", ("/data", "a b.csv")),
    ],
)
def test_an_address_is_a_place_and_a_key(url, parts):
    assert split_url(url) == parts


# -- faults -----------------------------------------------------------------------------------------------------------


def test_what_is_not_there_and_what_is_refused(through, proxy):
    through.write("a", b"x")
    for call in (through.read, through.stat, through.open, lambda key: through.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError, match="it is not there"):
            call("b")
    before = len(proxy.seen)
    proxy.fault(Fault("status", status=403, code="AccessDenied"))
    with pytest.raises(PermissionError, match="access is refused"):
        through.read("a")
    assert len(proxy.seen) == before + 1, "neither is tried again"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503, code="SlowDown", headers={"Retry-After": "0"}), Fault("status", status=500),
        Fault("status", status=400, code="RequestTimeout"), Fault("drop"), Fault("truncate", keep=50),
        Fault("shorten", keep=50), Fault("damage"), Fault("truncate", keep=0), Fault("ignore-range"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}",
)  # fmt: skip
def test_a_passing_fault_is_ridden_out(through, proxy, fault):
    data = os.urandom(100_000)
    through.write("a", data)
    proxy.fault(fault, match="GET", times=1 if fault.kind == "damage" else 2)
    assert through.read("a") == data
    if fault.kind != "damage":  # nothing tells of a flipped bit in a part of an object
        proxy.fault(fault, match="GET", times=2)
        assert through.read_range("a", 1000, 5000) == data[1000:6000]


@pytest.mark.parametrize("after", [False, True])
def test_a_write_is_repeated(s3, through, proxy, after, monkeypatch):  # noqa: F811
    monkeypatch.setattr(objects_module, "PART_BYTES", 5 << 20)
    data = os.urandom(6 << 20)
    for key, content in (("small", b"x" * 100), ("big", data)):
        proxy.fault(Fault("drop", after=after), match=".*", times=1)
        proxy.fault(Fault("status", status=503), match="PUT", times=1)
        proxy.fault(Fault("drop", after=after), match="POST .*uploadId", times=1)
        through.write(key, content)
        assert s3.get("remote", f"pre/{key}") == content
        proxy.clear()


def test_an_upload_that_fails_leaves_nothing(s3, through, proxy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(objects_module, "PART_BYTES", 5 << 20)
    proxy.fault(Fault("status", status=503), match="PUT .*partNumber=2", times=99)
    with pytest.raises(OutOfReach):
        through.write("failing", os.urandom(6 << 20))
    assert s3.objects("remote") == []
    uploads = s3.client.list_multipart_uploads(Bucket="remote").get("Uploads", [])
    assert "pre/failing" not in [upload["Key"] for upload in uploads]


def test_a_tag_that_is_no_md5_is_believed_after_the_same_bytes_twice(s3, store, through, proxy):  # noqa: F811
    data = os.urandom(1000)
    through.write("a", data)
    proxy.fault(Fault("retag"), match="GET", times=2)
    assert through.read("a") == data
    proxy.fault(Fault("retag"), match="GET", times=1)
    before = proxy.count("GET")
    assert through.read("a") == data
    assert proxy.count("GET") == before + 1


def test_an_object_that_changes_while_it_is_read_is_not_mixed(store):
    store.write("a", os.urandom(200_000))
    with store.open("a") as stream:
        stream.read(10)
        store.write("a", os.urandom(200_000))
        stream.seek(150_000)
        with pytest.raises(FileNotFoundError, match="changed while it was being read"):
            stream.read(10)


def test_a_slow_answer_is_given_up_and_asked_for_again(s3, proxy):  # noqa: F811
    hasty = replace(QUICK, timeout_seconds=0.2)
    store = open_store(f"s3://{s3.bucket('remote')}", access=s3.access(endpoint=proxy.endpoint), retry=hasty)
    store.write("a", b"x")
    proxy.fault(Fault("slow", seconds=0.6), times=2)
    assert store.read("a") == b"x"
    proxy.fault(Fault("slow", seconds=0.6), times=9)
    with pytest.raises(OutOfReach, match="no answer for 0.2 s"):
        store.read("a")


def test_a_server_that_is_gone_and_comes_back(s3, store):  # noqa: F811
    store.write("a", b"x")
    s3.stop()
    with pytest.raises(OutOfReach, match="the connection is refused") as caught:
        store.read("a")
    assert SECRET not in str(caught.value)
    assert "resume_from_checkpoint" in str(caught.value)
    waits = []
    patient = replace(
        QUICK, attempts=10, sleep=lambda seconds: waits.append(seconds) or (len(waits) == 3 and s3.start())
    )
    again = open_store("s3://remote/pre", access=s3.access(), retry=patient)
    assert again.read("a") == b"x"
    assert len(waits) == 3


def test_connections_are_kept(s3, proxy):  # noqa: F811
    store = open_store(f"s3://{s3.bucket('remote')}", access=s3.access(endpoint=proxy.endpoint), retry=QUICK)
    store.write("a", b"x")
    for _ in range(20):
        store.read("a")
        time.sleep(0.02)  # a connection is kept a moment after its answer is read: at once, one or two more are opened
    assert proxy.num_connections == 1


# -- the policy -------------------------------------------------------------------------------------------------------


def test_waits_double_and_are_spread():
    policy = RetryPolicy(base_seconds=1, max_seconds=10, draw=lambda: 0.0)
    assert [policy.delay(number) for number in range(5)] == [1, 2, 4, 8, 10]
    assert replace(policy, draw=lambda: 0.999999).delay(1) == pytest.approx(1, rel=1e-3)
    assert policy.delay(0, after_seconds=7) == 7
    assert policy.delay(0, after_seconds=700) == 10


def test_retry_after_of_a_web_server_is_waited_for(s3, proxy):  # noqa: F811
    """Of a bucket it is not known: obstore keeps the headers of an answer that is an error to itself."""
    waits = []
    policy = replace(QUICK, max_seconds=30, sleep=waits.append)
    s3.client.put_object(Bucket=s3.bucket("remote"), Key="a", Body=b"x", ACL="public-read")
    store = open_store(f"{proxy.endpoint}/remote", retry=policy)
    proxy.fault(Fault("status", status=503, headers={"Retry-After": "7"}))
    assert store.read("a") == b"x"
    assert waits == [7]


# -- accounts ---------------------------------------------------------------------------------------------------------


def test_rejected_credentials_end_the_run_rather_than_every_image(through, proxy):
    through.write("a", b"x")
    for code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        proxy.fault(Fault("status", status=403, code=code))
        with pytest.raises(CredentialsRejected, match=code):
            through.read("a")


def test_a_bucket_that_is_not_there(s3):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        list(open_store("s3://nowhere", access=s3.access(), retry=QUICK).list())


def test_an_account_is_never_shown(s3):  # noqa: F811
    assert SECRET not in repr(s3.access())
    assert SECRET not in repr(open_store("s3://remote", access=s3.access(), retry=QUICK).__dict__)


def test_the_usual_chain_finds_the_account(s3, tmp_path, monkeypatch):  # noqa: F811
    files = {
        "credentials": f"[mine]\naws_access_key_id = AKIAFILE\naws_secret_access_key = {SECRET}\n",
        "config": f"[profile mine]\nregion = eu-west-1\nendpoint_url = {s3.endpoint}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3.put(s3.bucket("remote"), "a", b"x")
    assert open_store("s3://remote", access=S3Access(profile="mine"), retry=QUICK).read("a") == b"x"
    with pytest.raises(UserError, match="there is no such profile"):
        open_store("s3://remote", access=S3Access(profile="yours"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert open_store("s3://remote", retry=QUICK).read("a") == b"x"


def test_a_listing_that_is_none(through, proxy):
    through.write("a", b"x")
    proxy.fault(Fault("status", status=200, code="x"), match="GET .*list-type", times=1)
    assert [entry.key for entry in through.list()] == ["a"]
    proxy.fault(Fault("status", status=405), match="GET .*list-type", times=1)
    with pytest.raises(DistillError, match="refuses the request"):
        list(through.list())
