"""Buckets of Google and Azure: the store's promises, and the batches of the folder, on a server where there is one."""

import os
from dataclasses import replace

import pytest
from distill.core.data.tables import locations
from distill.core.errors import BadValue, ConfigError, OutOfReach, UserError
from distill.core.storage import is_remote, open_store, split_url
from distill.core.storage import objects as objects_module
from distill.core.storage.account import AzureSettings, GcsSettings
from distill.core.storage.refusals import CredentialsRejected, failure
from distill.core.storage.retry import Transient
from distill.data_backends.azure import AzureBackend
from distill.data_backends.gcs import GcsBackend
from distill.plugins.bucket import AzureContainer, GcsBucket
from support.cloud_servers import BUCKET, azure_keys, gcs_keys, put_gcs
from support.data_helpers import BACKENDS, entry, fill, pipeline, take
from support.s3_server import QUICK
from test_data_pipeline import MIXED, by_position
from test_publishers import FILES, PublishSetting

CLOUDS = {"gcs": (GcsBackend, GcsSettings, gcs_keys), "azure": (AzureBackend, AzureSettings, azure_keys)}
PLAIN = ["a b.jpg", "100%.jpg", "a#b?c.jpg", "émoji😀.jpg", "a+b&c=d.jpg", "~t.jpg", "a%20b.jpg", "[x].jpg", "*.jpg"]


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request, tmp_path_factory):
    """Name of a cloud, and keys that reach an empty bucket of it."""
    server = CLOUDS[request.param][2](tmp_path_factory.mktemp(request.param))
    yield request.param, next(server)
    server.close()


def settings(cloud):
    name, keys = cloud
    own = CLOUDS[name][1]
    return own(**{key: value for key, value in keys.items() if key in own.model_fields})


def opened(cloud, prefix, **changes):
    return settings(cloud).open(BUCKET, prefix, retry=replace(QUICK, **changes))


def put(cloud, prefix, key, data):
    if cloud[0] == "gcs":
        put_gcs(cloud[1]["gcs_endpoint_url"], f"{prefix}/{key}", data)
    else:
        opened(cloud, prefix).write(key, data)


def writable(cloud):
    if cloud[0] == "gcs":
        pytest.skip("fake-gcs-server takes no writes of the XML protocol, which obstore speaks")


def test_what_is_there_is_read_listed_and_removed(cloud):
    store = opened(cloud, "pre")
    for key in PLAIN:
        put(cloud, "pre", key, key.encode())
    put(cloud, "prefix", "x", b"x")
    assert [found.key for found in store.list()] == sorted(PLAIN)
    for found in store.list():
        assert store.read(found.key) == found.key.encode()
        assert store.stat(found.key) == found
        assert found.version
    assert [found.key for found in store.list("a")] == sorted(key for key in PLAIN if key.startswith("a"))
    put(cloud, "pre", "range", b"0123456789")
    assert [store.read_range("range", *span) for span in ((2, 3), (8, 100), (10, 5))] == [b"234", b"89", b""]
    for call in (store.read, store.stat, store.open):
        with pytest.raises(FileNotFoundError, match="it is not there"):
            call("b")
    for key in ("range", "range", *PLAIN):
        store.delete(key)
    assert not list(store.list())


def test_an_object_that_changes_while_it_is_read_is_not_mixed(cloud):
    store = opened(cloud, "changing")
    put(cloud, "changing", "a", os.urandom(200_000))
    with store.open("a") as stream:
        stream.read(10)
        put(cloud, "changing", "a", os.urandom(200_000))
        stream.seek(150_000)
        with pytest.raises(FileNotFoundError, match="changed while it was being read"):
            stream.read(10)


def test_large_objects_go_in_parts(cloud, tmp_path, monkeypatch):
    writable(cloud)
    monkeypatch.setattr(objects_module, "PART_BYTES", 5 << 20)
    store, data = opened(cloud, "big"), os.urandom((12 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    store.upload("a", tmp_path / "file")
    assert store.read("a") == data
    assert store.read_range("a", 3, len(data)) == data[3:]


def test_a_bucket_gives_the_batches_of_the_folder_and_so_do_its_urls(cloud, tmp_path, monkeypatch):
    name, keys = cloud
    backend = CLOUDS[name][0]
    monkeypatch.setitem(BACKENDS, name, backend)
    folder = fill(tmp_path / "set", MIXED)
    for path in folder.iterdir():
        put(cloud, "images", path.name, path.read_bytes())
    local, _ = pipeline(entry(folder), root=tmp_path / "1")
    expected = by_position([take(local, 12)]), local.fingerprint()
    far = entry(folder, type=name, instance_data_dir=None).model_copy(
        update={"backend": backend.Config(**keys, **{backend.place_keys[0]: "images"})}
    )
    data, _ = pipeline(far, root=tmp_path / "2")
    assert (by_position([take(data, 12)]), data.fingerprint()) == expected

    rows = "".join(f'{{"file_name": "{path.name}"}}\n' for path in sorted(folder.glob("*.png")))
    put(cloud, "images", "t.jsonl", rows.encode())
    scheme = settings(cloud).scheme
    if name == "gcs":
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(keys["gcs_service_account_file"]))
    else:
        for variable, key in (
            ("ACCOUNT_NAME", "account_name"),
            ("ACCOUNT_KEY", "account_key"),
            ("ENDPOINT", "endpoint_url"),
        ):
            monkeypatch.setenv(f"AZURE_STORAGE_{variable}", keys[f"azure_{key}"])
    locations._store.cache_clear()
    file = locations.locate("jsonl_file", [f"{scheme}://{BUCKET}/images/*.jsonl"], [".jsonl"])
    assert [found.place for found in file] == [f"{scheme}://{BUCKET}/images/t.jsonl"]
    assert file[0].open().read() == rows.encode()
    locations._store.cache_clear()


def test_a_student_is_published(cloud, tmp_path):
    writable(cloud)
    name, keys = cloud
    (tmp_path / "student").mkdir()
    for file, content in FILES.items():
        (tmp_path / "student" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / file).write_bytes(content)
    kind = {"gcs": GcsBucket, "azure": AzureContainer}[name]
    publisher = kind(kind.Config(**keys), PublishSetting("fox"))
    assert publisher.problems() == []
    assert publisher.publish(tmp_path / "student") == f"{settings(cloud).scheme}://{BUCKET}/fox"
    assert [found.key for found in opened(cloud, "fox").list()] == sorted([*FILES, "manifest.json"])


def test_a_bucket_that_is_not_there_is_named_with_its_key(cloud):
    name, keys = cloud
    if name == "gcs":
        pytest.skip("fake-gcs-server answers 500 for a bucket that is not there")
    backend = CLOUDS[name][0]
    config = backend.Config(**{**keys, backend.bucket_key: "nowhere"})
    with pytest.raises(BadValue, match="'nowhere' does not exist"):
        list(backend(config).list())


# -- without a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_their_urls_are_remote(scheme):
    url = f"{scheme}://bucket/tables/a.csv"
    assert is_remote(url)
    assert split_url(url) == (f"{scheme}://bucket/tables", "a.csv")
    assert open_store(f"{scheme}://bucket/tables").url == f"{scheme}://bucket/tables/"
    with pytest.raises(UserError, match=f"write {scheme}://bucket/prefix"):
        open_store(f"{scheme}:///x")


def test_a_server_that_is_gone_is_said_without_the_account():
    given = AzureSettings(
        azure_account_name="a", azure_account_key="c2VjcmV0a2V5", azure_endpoint_url="http://127.0.0.1:9/a"
    )
    store = given.open("data", "pre", retry=QUICK)
    for call in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.write("a", b"x")):
        with pytest.raises(OutOfReach, match="the connection is refused .tried 3 times") as caught:
            call()
        assert "c2VjcmV0" not in str(caught.value)
        assert "az://data/pre/" in str(caught.value)


def test_a_name_that_obstore_cannot_say_is_set_aside():
    given = AzureSettings(azure_account_name="a", azure_account_key="c2VjcmV0a2V5")
    with pytest.raises(FileNotFoundError, match="a name with an empty part|its name has an empty part"):
        given.open("data", "pre", retry=QUICK).read("x//y.jpg")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("Error performing token request: Error performing GET", CredentialsRejected, "no credentials are found"),
        (
            "status code: 403 Forbidden: <Code>AuthenticationFailed</Code>",
            CredentialsRejected,
            "403 AuthenticationFailed",
        ),
        ("status code: 403 Forbidden: ", PermissionError, "access is refused"),
        ("status code: 404 Not Found: <Code>ContainerNotFound</Code>", FileNotFoundError, "'b' does not exist"),
        ("status code: 429 Too Many: ", Transient, "429"),
        ('kind: Connect, ConnectError("dns error")', Transient, "cannot be resolved"),
        ("kind: Connect, source: TimedOut", Transient, "no connection is made in time"),
        ("kind: Timeout", Transient, "no answer for 5 s"),
        ("Encountered object with invalid path: x//y", Exception, "cannot be listed"),
    ],
)
def test_what_obstore_says_becomes_what_is_raised(text, kind, said):
    found = failure(Exception(text), "gs://b/k", bucket="b", note="", seconds=5)
    assert isinstance(found, kind)
    assert said in str(found)


@pytest.mark.parametrize(
    ("backend", "keys", "said"),
    [
        (GcsBackend, {"gcs_bucket_name": "a/b"}, "is no name of a bucket"),
        (GcsBackend, {"gcs_bucket_name": "a", "gcs_endpoint_url": "host:1"}, "is no address"),
        (AzureBackend, {"azure_container_name": "a/b", "azure_account_name": "x"}, "is no name of a bucket"),
    ],
)
def test_mistakes_are_found_before_anything_is_asked(backend, keys, said):
    with pytest.raises(BadValue, match=said):
        backend(backend.Config(**keys)).check()


def test_an_account_of_azure_has_a_name(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises((ConfigError, ValueError), match="azure_account_name is required"):
        AzureBackend.Config(azure_container_name="a")
