"""The codec against the libraries it talks to, and against everything nobody should send."""

from __future__ import annotations

import contextlib
import io
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from omega_qvla.errors import WireError
from omega_qvla.serving.wire import (
    DTYPES,
    Bounds,
    decode,
    decode_map,
    encode,
    gr00t_array,
    openpi_array,
)

pytestmark = pytest.mark.long

msgpack = pytest.importorskip("msgpack", reason="the extra serve is not installed")

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
keys = st.text(max_size=12).filter(lambda key: not key.startswith("__"))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(keys, inner, max_size=20),
    max_leaves=40,
)
array_values = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: arrays.arrays(
        np.dtype(dtype), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
DEEP = Bounds(depth=60)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@given(values)
def test_values_survive_the_round_trip(value: Any) -> None:
    assert decode(encode(value), DEEP) == value


@given(values)
def test_the_bytes_are_the_librarys_and_its_bytes_are_read(value: Any) -> None:
    assert encode(value) == msgpack.packb(value)
    assert msgpack.unpackb(encode(value)) == value


@given(array_values, st.sampled_from([openpi_array, gr00t_array]))
def test_arrays_survive_in_both_dialects_and_stay_read_only(array: np.ndarray, form: Any) -> None:
    found = decode(encode({"a": array}, form))["a"]
    assert equal(found, array) and not found.flags.writeable


@given(array_values)
def test_arrays_of_the_published_openpi_client_are_read(array: np.ndarray) -> None:
    client = pytest.importorskip("openpi_client.msgpack_numpy", reason="openpi-client is absent")
    assert equal(decode(client.packb(array)), array)
    assert equal(np.asarray(client.unpackb(encode(array))), array)


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(9)])
def test_numpy_scalars_of_the_openpi_client_are_read(scalar: Any) -> None:
    client = pytest.importorskip("openpi_client.msgpack_numpy", reason="openpi-client is absent")
    found = decode(client.packb({"x": scalar}))["x"]
    assert found == scalar and found.dtype == scalar.dtype


@given(array_values)
def test_npy_is_what_numpy_writes_and_reads(array: np.ndarray) -> None:
    assert gr00t_array(array)["as_npy"] == npy(np.ascontiguousarray(array).reshape(array.shape))
    file = {"__ndarray_class__": True, "as_npy": npy(array.T)}
    assert equal(decode(msgpack.packb(file)), array.T)


def openpi(**changes: Any) -> bytes:
    form = {
        b"__ndarray__": True,
        b"data": bytes(12),
        b"dtype": "<f4",
        b"shape": [3],
    }
    form |= {key.encode(): value for key, value in changes.items()}
    return msgpack.packb({key: value for key, value in form.items() if value is not ...})


@pytest.mark.parametrize(
    ("message", "told"),
    [
        *((openpi(dtype=dtype), "not accepted") for dtype in ("|O", "<M8[ns]", "<m8[s]", "|V4")),
        *((openpi(dtype=dtype), "not accepted") for dtype in ("<U3", "|S4", ">f4", "<c8", "float")),
        (openpi(dtype=None), "not accepted"),
        (openpi(dtype=[("x", "<f4")]), "not accepted"),
        (openpi(shape=[4]), "takes 16 bytes, its data has 12"),
        (openpi(shape=[2**40, 2**40, 2**40]), "must hold sizes"),
        (openpi(shape=[-3]), "must hold sizes"),
        (openpi(shape=[True, 3]), "must hold sizes"),
        (openpi(shape=[3.0]), "must hold sizes"),
        (openpi(shape=[1] * 7), "7 dimensions"),
        (openpi(shape="3"), "shape a list"),
        (openpi(shape=...), "must have the keys"),
        (openpi(more=1), "must have the keys"),
        (openpi(__ndarray__=1), "must have the keys"),
        (openpi(dtype="|b1", data=b"\0\1\2"), "other than 0 and 1"),
        (msgpack.packb({"data": 1, b"data": 2}), "as text and as bytes"),
        (msgpack.packb({"__npgeneric__": True, "data": "x", "dtype": "<f4"}), "must be a number"),
        (msgpack.packb({"__npgeneric__": True, "data": 300, "dtype": "|u1"}), "no uint8"),
        (openpi(data=b"", shape=[0, 2**24, 2**24, 2**24]), "takes 0 bytes"),
        (b"\x82\xa1a\x01\xa1a\x02", "appears twice"),
        (b"\x81\x01\x02", "int is not allowed for map key"),
        (b"\x81\x90\x02", "list is not allowed for map key"),
        (b"\xdd\xff\xff\xff\xff", "4294967295 exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "4294967295 exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete input"),
        (b"\xdb\x00\x10\x00\x00" + b"x" * 2**20, "1048576 exceeds max_str_len"),
        (b"\xa1\xff", "invalid start byte"),
        (b"\xc1", "no message within the limits"),
        (b"\xd4\x01\x00", "exceeds max_ext_len"),
        (b"\xd6\xff\x00\x00\x00\x00", "exceeds max_ext_len"),
        (b"\xc7\x01\x05x", "exceeds max_ext_len"),
        (b"\xc7\x00\x05", "extension type 5"),
        (b"", "incomplete input"),
        (b"\x01\x01", "extra data"),
        (b"\x91" * 9 + b"\x01", "nested more than 8 deep"),
        (b"\x81\xa1a" * 9 + b"\x01", "nested more than 8 deep"),
        (b"\x91" * 900 + b"\x01", "nested more than 8 deep"),
        (b"\x91" * 100_000, "nested too deep"),
        (b"\xdc\x10\x01" + b"\xc0" * 4097, "exceeds max_array_len"),
        (b"\x92" + 2 * (b"\xdc\x0f\xff" + b"\xc0" * 4095), "more than 4096 values"),
        (b"\xdc\x0f\xff" + b"\x80" * 4095, "more than 4096 values"),
    ],
)
def test_what_nobody_should_send_is_refused_with_the_reason(message: bytes, told: str) -> None:
    with pytest.raises(WireError, match=told):
        decode(message)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"


@pytest.mark.parametrize(
    "file",
    [
        npy(np.zeros(3, np.complex64)),
        npy(np.zeros(3, "M8[s]")),
        npy(np.zeros(3, ">f4")),
        npy(np.zeros(3, "S4")),
        npy(np.zeros(3, [("x", "<f4")])),
        npy(np.zeros(3, np.float32))[:-1],
        npy(np.zeros(3, np.float32)) + b"\0",
        npy(np.zeros(3, np.float32)).replace(b"\x01\x00", b"\x02\x00", 1),
        b"\x93NUMPY\x01\x00" + len(HEADER).to_bytes(2, "little") + HEADER + bytes(12),
        b"\x93NUMPY\x01\x00\xff\xff" + HEADER + b"\n",
        b"\x93NUMPY\x01\x00" + (20_001).to_bytes(2, "little") + b"(" * 20_000 + b"\n",
        b"PK\x03\x04",
        b"",
        "text",
        None,
    ],
)
def test_files_that_numpy_does_not_write_for_numbers_are_refused(file: Any) -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb({"__ndarray_class__": True, "as_npy": file}))


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="at most 100 are accepted"):
        decode(bytes(101), Bounds(message_bytes=100))


def test_containers_inside_containers_cost_no_memory_beyond_the_values_that_are_counted() -> None:
    """A megabyte of empty maps: each takes 64 bytes, and reading ends at the limit."""
    maps = b"\xdc\x04\x00" + b"\x80" * 1024
    message = b"\xdc\x04\x00" + maps * 1024
    tracemalloc.start()
    with pytest.raises(WireError, match="more than 4096 values"):
        decode(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_request_is_a_map_with_texts_as_keys() -> None:
    assert decode_map(msgpack.packb({"a": 1})) == {"a": 1}
    for wrong in ([1], 1, None, {b"a": 1}):
        with pytest.raises(WireError):
            decode_map(msgpack.packb(wrong))


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, np.complex64),
        np.zeros(2, ">f4"),
        object(),
        2**64,
        -(2**63) - 1,
        "\ud800",
        {1, 2},
    ],
)
def test_what_no_message_can_hold_is_not_sent(value: Any) -> None:
    with pytest.raises(WireError):
        encode({"x": value})


def test_infinities_and_nan_pass_the_wire_for_the_specification_to_judge() -> None:
    found = decode(encode([math.inf, -math.inf, math.nan]))
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2])


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_end_in_a_value_or_in_our_error(data: bytes) -> None:
    try:
        decode(data)
    except WireError as error:
        assert len(str(error)) < 400 and str(error).isprintable()


@settings(max_examples=300)
@given(values, st.data())
def test_damaged_messages_end_in_a_value_or_in_our_error(value: Any, data: Any) -> None:
    message = bytearray(encode({"v": value, "a": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    with contextlib.suppress(WireError):
        decode(bytes(message[:cut] if data.draw(st.booleans()) else message), DEEP)
