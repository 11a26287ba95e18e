"""The few XML documents of the S3 protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from .retry import Transient


@dataclass(frozen=True)
class Page:
    """Part of a listing: (key, size in bytes, ETag) of each object, and the token of the next part if there is one."""

    objects: list[tuple[str, int, str]]
    token: str | None


def _parsed(body: bytes) -> ElementTree.Element:
    """The document, with plain tags. Raises Transient where it is none: it was cut short, or comes from a proxy."""
    if b"<!DOCTYPE" in body[:1000]:  # entities could make a small answer fill the memory
        raise Transient("the answer is no listing but a page for people")
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        raise Transient("the answer is no whole XML document") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def page(body: bytes) -> Page:
    """A page of ``ListObjectsV2`` with ``encoding-type=url``."""
    root = _parsed(body)
    if root.tag != "ListBucketResult":
        raise Transient(f"the answer is no listing but <{root.tag}>")
    encoded = root.findtext("EncodingType") == "url"
    objects = []
    for item in root.iterfind("Contents"):
        key = item.findtext("Key", "")
        etag = item.findtext("ETag", "").strip('"')
        objects.append((unquote_plus(key) if encoded else key, int(item.findtext("Size", "0")), etag))
    more = root.findtext("IsTruncated") == "true"
    return Page(objects, root.findtext("NextContinuationToken") if more else None)


def text(body: bytes, tag: str) -> str:
    """The text of one element. Raises Transient where it is missing."""
    found = _parsed(body).findtext(tag)
    if not found:
        raise Transient(f"the answer has no {tag}")
    return found


def error_code(body: bytes) -> str:
    """The code of an error document, empty where the body is none."""
    if b"<Error" not in body:
        return ""
    try:
        root = _parsed(body)
    except Transient:
        return ""
    return root.findtext("Code", "") if root.tag == "Error" else ""


def completion(etags: Sequence[str]) -> bytes:
    """The request that puts the parts of an upload together."""
    root = ElementTree.Element("CompleteMultipartUpload")
    for number, etag in enumerate(etags, 1):
        part = ElementTree.SubElement(root, "Part")
        ElementTree.SubElement(part, "PartNumber").text = str(number)
        ElementTree.SubElement(part, "ETag").text = etag
    return ElementTree.tostring(root)
