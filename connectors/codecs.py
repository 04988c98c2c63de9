"""Payloads as bytes, each named by a content type such as `application/vnd.stepstream.reading+json; v=1`.

JSON is for small things and for people, Arrow IPC for arrays: float32 comes back bit for bit. `v` is the version of the
payload's schema; a decoder refuses a version it does not know rather than guess.

JSON has no NaN and no infinity: both are written as null. A null reads back as NaN, except in `age_s`, where it reads
back as infinity (never observed), and in the features of an interaction, where it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from stepstream.connectors import (
    codec_arrow,
    codec_arrow_graph,
    codec_arrow_memory,
    codec_detections,
    codec_events,
    codec_json,
    codec_sweep,
)
from stepstream.connectors.base import InputError
from stepstream.connectors.bev_grids import Grid, decode_grid, encode_grid
from stepstream.connectors.codec_json import kind_of
from stepstream.connectors.event_frames import EventFrame, decode_event_frame, encode_event_frame
from stepstream.connectors.records import (
    Activity,
    Detections,
    EventSlice,
    Forecast,
    Interaction,
    LinkScores,
    NodeMemory,
    Reading,
    Score,
    SensorFrame,
    Sweep,
)

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Encoded",
    "Form",
    "decode",
    "encode",
    "kind_of",
    "known_kinds",
    "parse_content_type",
    "register_codec",
    "warm_up",
]

Form: TypeAlias = Literal["json", "arrow", "evt3"]

DEFAULT_MAX_BYTES = 32 * 2**20
"""Largest body that `decode` looks at unless told otherwise."""

_CONTENT_TYPE = re.compile(r"application/vnd\.stepstream\.([a-z][a-z0-9_]*)\+(json|arrow|evt3)\s*;\s*v=(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A payload on the wire: its content type, the version of its schema (also in the content type), and its bytes."""

    content_type: str
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Codec:
    kind: str
    form: Form
    version: int
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]

    @property
    def content_type(self) -> str:
        return f"application/vnd.stepstream.{self.kind}+{self.form}; v={self.version}"


_BY_NAME: dict[tuple[str, str, int], _Codec] = {}
# Per payload type: its codecs by form, the default form first.
_BY_TYPE: dict[type, dict[str, _Codec]] = {}


def register_codec(
    payload: type,
    form: Form,
    encode: Callable[[Any], bytes],
    decode: Callable[[bytes], Any],
    version: int = 1,
) -> None:
    """Adds a codec for a payload type. The first one registered for a type is its default form; versions may coexist
    for decoding, and the last one registered for a form is written. `decode` raises ValueError for a bad body.
    """
    codec = _Codec(kind_of(payload), form, version, encode, decode)
    _BY_NAME[codec.kind, form, version] = codec
    _BY_TYPE.setdefault(payload, {})[form] = codec


def _json_encoder(payload: type) -> Callable[[Any], bytes]:
    to_fields = codec_json.JSON_FIELDS[payload][0]
    return lambda value: codec_json.dump(to_fields(value))


def _json_decoder(payload: type) -> Callable[[bytes], Any]:
    from_fields = codec_json.JSON_FIELDS[payload][1]
    return lambda body: from_fields(codec_json.load_object(body))


def encode(value: object, form: Form | None = None) -> Encoded:
    """`value` as bytes, in its default form (Reading, Score, Interaction, Activity: json; SensorFrame, Forecast,
    LinkScores, NodeMemory, Sweep, EventSlice, Detections, Grid: arrow) or the one asked for.

    Raises InputError if the type has no such form. Units and shapes are those of the payload's class.
    """
    forms = _BY_TYPE.get(type(value))
    if forms is None:
        known = ", ".join(sorted(t.__name__ for t in _BY_TYPE))
        raise InputError(f"payload: no codec for {type(value).__name__}; known: {known} (see register_codec)")
    codec = next(iter(forms.values())) if form is None else forms.get(form)
    if codec is None:
        raise InputError(f"form: {type(value).__name__} has no {form!r} form; expected {' or '.join(forms)}")
    return Encoded(codec.content_type, codec.version, codec.encode(value))


def warm_up() -> None:
    """Makes the first arrays as quick to write and read as those after them: pyarrow imports pandas on the way, if that
    is there, which takes a second or more while a group's coordinator or a camera waits.
    """
    nothing = np.zeros(0, np.float32)
    encoded = encode(SensorFrame((), nothing, nothing.astype(np.bool_)))
    decode(encoded.content_type, encoded.body)


def parse_content_type(content_type: str) -> tuple[str, str, int]:
    """(kind, form, version) of a content type; raises InputError if it is not one of ours."""
    match = _CONTENT_TYPE.fullmatch(content_type.strip())
    if match is None:
        raise InputError(
            "content type: expected application/vnd.stepstream.KIND+json; v=N (or +arrow, +evt3), "
            f"got {content_type[:80]!r}"
        )
    return match[1], match[2], int(match[3])


def decode(content_type: str, body: bytes, max_bytes: int = DEFAULT_MAX_BYTES) -> Any:
    """The payload of `body`. Arrays in it are read-only and may share memory with `body`.

    Raises InputError, with the reason, for a body above `max_bytes`, an unknown kind, form or version, and a body that
    does not hold what its content type says. Nothing is allocated that is not proportional to the body's length, but
    for a sweep and a grid, which are compressed, and bounded by `sweep_checks.MAX_POINTS` and
    `bev_grids.MAX_WIRE_CELLS`.
    """
    if len(body) > max_bytes:
        raise InputError(f"body: {len(body)} bytes, at most {max_bytes} are taken")
    kind, form, version = parse_content_type(content_type)
    codec = _BY_NAME.get((kind, form, version))
    if codec is None:
        versions = sorted(v for k, f, v in _BY_NAME if (k, f) == (kind, form))
        if versions:
            raise InputError(f"content type: {kind}+{form} v={version} is unknown; known versions: {versions}")
        known = ", ".join(sorted({f"{k}+{f}" for k, f, _ in _BY_NAME}))
        raise InputError(f"content type: {kind}+{form} is unknown; known: {known}")
    try:
        return codec.decode(body)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(f"{kind}+{form}: {error}") from error


def known_kinds() -> list[str]:
    """The kinds of payloads that have a codec so far, sorted."""
    return sorted({kind for kind, _, _ in _BY_NAME})


def json_kinds() -> Mapping[str, type]:
    """The payload types that have a JSON form of their own, by kind."""
    return {kind_of(payload): payload for payload in codec_json.JSON_FIELDS}


for _payload in (Reading, Score, Interaction, Activity):
    register_codec(_payload, "json", _json_encoder(_payload), _json_decoder(_payload))
register_codec(SensorFrame, "arrow", codec_arrow.encode_frame, codec_arrow.decode_frame)
register_codec(SensorFrame, "json", _json_encoder(SensorFrame), _json_decoder(SensorFrame))
register_codec(Forecast, "arrow", codec_arrow.encode_forecast, codec_arrow.decode_forecast)
register_codec(Forecast, "json", _json_encoder(Forecast), _json_decoder(Forecast))
register_codec(Interaction, "arrow", codec_arrow_graph.encode_interaction, codec_arrow_graph.decode_interaction)
register_codec(LinkScores, "arrow", codec_arrow_graph.encode_link_scores, codec_arrow_graph.decode_link_scores)
register_codec(LinkScores, "json", _json_encoder(LinkScores), _json_decoder(LinkScores))
register_codec(NodeMemory, "arrow", codec_arrow_memory.encode_node_memory, codec_arrow_memory.decode_node_memory)
register_codec(Sweep, "arrow", codec_sweep.encode_sweep, codec_sweep.decode_sweep)
register_codec(Sweep, "json", _json_encoder(Sweep), _json_decoder(Sweep))
register_codec(EventSlice, "arrow", codec_events.encode_slice, codec_events.decode_slice)
register_codec(EventSlice, "evt3", codec_events.encode_slice_evt3, codec_events.decode_slice_evt3)
register_codec(EventSlice, "json", _json_encoder(EventSlice), _json_decoder(EventSlice))
register_codec(Detections, "arrow", codec_detections.encode_detections, codec_detections.decode_detections)
register_codec(Detections, "json", _json_encoder(Detections), _json_decoder(Detections))
register_codec(EventFrame, "arrow", encode_event_frame, decode_event_frame)
register_codec(Grid, "arrow", encode_grid, decode_grid)
