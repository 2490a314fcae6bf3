"""The webhook's certificate: what the API server trusts and what the webhook shows always fit, also while one is replaced."""

import base64
import socket
import ssl
import threading
import time

import pytest

from hotstart.adapters.kubernetes.objects import SECRETS, WEBHOOKS
from hotstart.operator import controller
from hotstart.operator.admission import AdmissionServer
from hotstart.operator.admission import World as ReviewWorld
from hotstart.operator.certificates import LASTS, make_pair, read_pair, service_names, utc
from tests.operator.world import SYSTEM, Killed, World

NAMES = service_names("hotstart-webhook", SYSTEM)
DAY = 86400


@pytest.fixture
def world(monkeypatch):
    made, numbers = World(), iter(range(1, 1000))
    real = controller.certificates.make_pair

    def numbered(names, now):  # keys are made once only: their making takes no part in the order of steps
        pair = real(names, now)
        made.pairs[pair.authority] = next(numbers)
        return pair

    made.pairs = {}
    monkeypatch.setattr(controller.certificates, "make_pair", numbered)
    return made


def trusted(world):
    (hook,) = world.cluster.get(WEBHOOKS, None, "hotstart")["webhooks"]
    return base64.b64decode(hook["clientConfig"].get("caBundle", ""))


def shown(world):
    return read_pair(world.cluster.get(SECRETS, SYSTEM, "hotstart-webhook-tls"))


def fits(world):
    return shown(world).authority in trusted(world)


def test_the_first_certificate_is_made_and_trusted(world):
    world.settle()
    assert fits(world)
    (hook,) = world.cluster.get(WEBHOOKS, None, "hotstart")["webhooks"]
    assert hook["clientConfig"]["service"] == {"name": "hotstart-webhook"}


def test_it_is_replaced_long_before_it_ends_and_what_is_shown_is_trusted_at_every_moment(world):
    world.settle()
    first = shown(world)
    world.now += LASTS.total_seconds() - 31 * DAY
    world.settle(120)
    assert shown(world) == first
    world.now += 2 * DAY
    shown_before = [first]
    for _ in range(30):
        world.settle(60)
        assert fits(world)
        assert shown_before[-1].authority in trusted(world)  # an operator may have read the Secret a minute ago
        shown_before.append(shown(world))
    assert shown(world) != first
    assert first.authority not in trusted(world)
    assert trusted(world).count(b"BEGIN CERTIFICATE") == 1


def test_what_an_upgrade_took_out_of_the_configuration_is_put_back(world):
    world.settle()
    hook = {"name": "placeholders.hotstart.dev", "clientConfig": {"service": {"name": "hotstart-webhook"}}}
    world.cluster.patch(WEBHOOKS, None, "hotstart", {"webhooks": [hook]})
    world.settle(120)
    assert fits(world)


def test_a_secret_that_was_emptied_or_spoilt_is_made_anew(world):
    world.settle()
    world.cluster.patch(SECRETS, SYSTEM, "hotstart-webhook-tls", {"data": {"tls.crt": "%%%"}})
    world.settle(120)
    assert fits(world)


def test_killed_at_any_step_of_a_replacement_the_certificate_still_fits(world, monkeypatch):
    real, left = controller.carry_out, [0]

    def dying(*arguments):
        real(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(controller, "carry_out", dying)
    world.settle()
    for round_ in range(1, 5):
        first = shown(world)
        world.now += LASTS.total_seconds() - 29 * DAY
        left[0] = round_
        for _ in range(30):
            try:
                world.settle(60)
            except Killed:
                world.restart()
            assert fits(world)
        assert shown(world) != first


def test_the_webhook_answers_over_tls_that_the_authority_vouches_for_and_changes_its_certificate():
    server = AdmissionServer(("127.0.0.1", 0), ReviewWorld(lambda *_: None, lambda: True), lambda _: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for _ in range(2):
            pair = make_pair(NAMES, utc(time.time()))
            server.use(pair)
            assert b'"allowed":true' in ask(server.server_address, pair)
        with pytest.raises(ssl.SSLError):
            ask(server.server_address, make_pair(NAMES, utc(time.time())))
        silent = socket.create_connection(server.server_address)  # says nothing, and holds nobody up
        assert b'"allowed":true' in ask(server.server_address, pair)
        silent.close()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("body", [b"{", b"[1]", b"null", b'{"request": 5}'])
def test_what_is_no_review_is_told_so(body):
    server = AdmissionServer(("127.0.0.1", 0), ReviewWorld(lambda *_: None, lambda: True), lambda _: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        pair = make_pair(NAMES, utc(time.time()))
        server.use(pair)
        answer = ask(server.server_address, pair, body)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))
    finally:
        server.shutdown()
        server.server_close()


def ask(address, pair, body=b'{"request": {"uid": "1", "object": {}}}'):
    context = ssl.create_default_context(cadata=pair.authority.decode())
    with socket.create_connection(address, timeout=30) as plain:
        with context.wrap_socket(plain, server_hostname=NAMES[0]) as secured:
            secured.sendall(
                b"POST /placeholders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            received = b""
            while more := secured.recv(65536):
                received += more
            return received
