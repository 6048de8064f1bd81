from __future__ import annotations

import socket
import struct
import threading

import numpy as np
import pytest

from omega_qvla.evaluation.simulators.channel import Channel, ChannelError, decode, encode


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_messages_survive_the_trip(ends):
    channel, raw = ends
    message = {
        "text": "é",
        "number": 1.5,
        "nothing": None,
        "list": [1, {"deep": np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::-1]}],
        "empty": np.zeros((0, 4), dtype=np.float32),
        "flag": np.bool_(True),
    }
    Channel(raw).send(message)
    received = channel.receive()
    assert received["text"] == "é" and received["number"] == 1.5 and received["nothing"] is None
    assert received["flag"] is True
    assert received["list"][1]["deep"].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert received["empty"].shape == (0, 4) and received["empty"].dtype == np.float32


def test_large_messages_cross_in_pieces(ends):
    channel, raw = ends
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    sender = threading.Thread(target=Channel(raw).send, args=({"image": image},))
    sender.start()
    assert np.array_equal(channel.receive()["image"], image)
    sender.join()


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array(["text"]), {1: 2}, {"$array": 0}, object(), 1j]
)
def test_what_is_neither_json_nor_numbers_is_not_sent(value):
    with pytest.raises(TypeError):
        encode({"value": value})


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"{", b""),
        (b"[]", b""),
        (b'{"arrays": []}', b""),
        (b'{"arrays": [], "message": 3}', b""),
        (b'{"arrays": [], "message": {"a": {"$array": 0}}}', b""),
        (b'{"arrays": [["object", [1]]], "message": {}}', b"12345678"),
        (b'{"arrays": [["float32", [2]]], "message": {}}', b"1234"),
        (b'{"arrays": [["float32", [-1]]], "message": {}}', b""),
        (b'{"arrays": [], "message": {}}', b"left over"),
        (b"[" * 100_000, b""),
    ],
)
def test_what_is_no_message_is_refused(header, body):
    with pytest.raises(ChannelError):
        decode(header, bytearray(body))


def test_a_torn_oversized_or_missing_message_is_a_channel_error(ends):
    channel, raw = ends
    raw.sendall(encode({"a": 1})[:-3])
    raw.close()
    with pytest.raises(ChannelError, match="closed"):
        channel.receive()
    with pytest.raises(ChannelError):
        for _ in range(1000):
            channel.send({"a": np.zeros(10_000)})


def test_an_announced_giant_is_refused_before_it_is_allocated(ends):
    channel, raw = ends
    raw.sendall(struct.pack("<IQ", 10, 1 << 60))
    with pytest.raises(ChannelError, match="refused"):
        channel.receive()


def test_silence_inside_a_message_ends_in_an_error(ends):
    channel, raw = ends
    channel.settimeout(0.05)
    raw.sendall(b"\x05")
    with pytest.raises(ChannelError, match="timed out"):
        channel.receive()
