"""Marking: every released PNG says that it is synthetic, in a standard place and without touching a pixel.

The mark is an XMP packet in an iTXt chunk (`XML:com.adobe.xmp`), with the IPTC digital source type
`trainedAlgorithmicMedia` and the facts needed to find the sample again. The chunk is put before the first IDAT of the
bytes as they are, so the compressed pixels are carried over unchanged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:dermafactory:ns:1.0:"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEYWORD = b"XML:com.adobe.xmp"


def xmp_packet(facts: Mapping[str, object]) -> str:
    """An XMP packet that declares synthetic media; `facts` (generator, seed, row_id, ...) become attributes."""
    attributes = "".join(f" df:{name}={quoteattr(str(value))}" for name, value in facts.items() if value is not None)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about=""'
        f' xmlns:Iptc4xmpExt="{_IPTC}" xmlns:df="{NAMESPACE}"'
        f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"{attributes}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def mark(png: bytes, packet: str) -> bytes:
    """The same PNG with this XMP packet in place of any it had; all other chunks are copied byte for byte."""
    text = _KEYWORD + b"\0\0\0\0\0" + packet.encode()  # uncompressed, no language, no translated keyword
    chunk = struct.pack(">I", len(text)) + b"iTXt" + text + struct.pack(">I", zlib.crc32(b"iTXt" + text))
    out = [_SIGNATURE]
    marked = False
    for kind, data, raw in _chunks(png):
        if kind == b"iTXt" and data.startswith(_KEYWORD + b"\0"):
            continue
        if kind == b"IDAT" and not marked:
            out.append(chunk)
            marked = True
        out.append(raw)
    if not marked:
        raise ValueError("image must be a PNG with pixels (an IDAT chunk), got none; decode it before it is released.")
    return b"".join(out)


def read_mark(png: bytes) -> dict[str, str] | None:
    """What a marked PNG says of itself (`digital_source_type` and the facts), or None: not marked by the factory."""
    for kind, data, _ in _chunks(png):
        if kind == b"iTXt" and data.startswith(_KEYWORD + b"\0"):
            return _facts(data[len(_KEYWORD) + 5 :].decode())
    return None


def _facts(packet: str) -> dict[str, str] | None:
    start, end = packet.find("<x:xmpmeta"), packet.rfind("</x:xmpmeta>")
    description = ElementTree.fromstring(packet[start : end + len("</x:xmpmeta>")]).find(f".//{{{_RDF}}}Description")
    if description is None or f"{{{_IPTC}}}DigitalSourceType" not in description.attrib:
        return None
    ours = {k.removeprefix(f"{{{NAMESPACE}}}"): v for k, v in description.attrib.items() if NAMESPACE in k}
    return {"digital_source_type": description.attrib[f"{{{_IPTC}}}DigitalSourceType"], **ours}


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Every chunk of a PNG as (kind, data, raw bytes with length and checksum)."""
    if not png.startswith(_SIGNATURE):
        raise ValueError(f"image must be PNG bytes, got {png[:8]!r}; samples are stored as PNG by factory.images.")
    at = len(_SIGNATURE)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        end = at + 12 + length
        if end > len(png):
            raise ValueError(f"image must be a whole PNG, got one cut off at byte {len(png)}; verify the run's tables.")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length], png[at:end]
        at = end
