"""The configuration: what is read, and what is refused by its place."""

import pytest

from hotstart.errors import BadUsage, NotFound
from hotstart.serve.config import load_config, parse_config

SMALLEST = """
listen = "127.0.0.1:8080"
[[model]]
name = "chat"
command = ["python", "server.py"]
port = 8000
"""
WHOLE = (
    SMALLEST
    + """ready_url = "http://127.0.0.1:8000/health"
warmup = "warmup.jsonl"
route = "/chat"
min_replicas = 0
max_replicas = 4
concurrency = 1
idle_s = 60
memory = "4G"
[model.timeouts]
queue_s = 3
[limits]
connections = 10
[machine]
memory = "16G"
"""
)


def test_the_smallest_configuration_has_the_defaults_of_the_document():
    config = parse_config(SMALLEST, "m.toml", "/etc/hotstart")
    (model,) = config.model
    assert (model.min_replicas, model.max_replicas, model.concurrency, model.idle_s) == (0, 1, 1, 60.0)
    assert model.cwd == "/etc/hotstart"
    assert (config.gateway.host, config.gateway.port) == ("127.0.0.1", 8080)


def test_all_of_it_reaches_those_whom_it_concerns():
    config = parse_config(WHOLE, "m.toml", "/etc")
    assert config.model[0].warmup == "/etc/warmup.jsonl"
    assert config.model[0].policy.max_replicas == 4
    assert config.model[0].policy.needs.memory_bytes == 4 << 30
    assert config.gateway.models[0].timeouts.queue_s == 3
    assert config.gateway.limits.connections == 10
    assert config.machine.memory_bytes == 16 << 30


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (("port = 8000", "prot = 8000"), "model chat: "),
        (("port = 8000", ""), "model chat: it lacks the key `port`"),
        (("port = 8000", 'port = "8000"'), "model chat, port: expected `int`"),
        (("port = 8000", "port = 70000"), "model chat, port: expected `int` <= 65535"),
        (("port = 8000", "port = 8000\nmin_replicas = 3"), "min_replicas 3 is more than max_replicas 1"),
        (("port = 8000", "port = 8000\nidle_s = -1"), "model chat, idle_s"),
        (("port = 8000", 'port = 8000\nroute = "chat"'), "does not start with /"),
        (("port = 8000", 'port = 8000\nroute = "/v1"'), "route"),
        (("port = 8000", 'port = 8000\nready_url = "ftp://x"'), "cannot be asked"),
        (("port = 8000", 'port = 8000\nmemory = "many"'), "memory: 'many' is not a size"),
        (("port = 8000", "port = 8000\ncolour = 1"), "model chat: there is no key `colour`"),
        (("port = 8000", "port = 8000\n[model.timeouts]\nqueue = 1"), "model chat, timeouts: there is no key `queue`"),
        (("port = 8000", "port = 8000\n[model.timeouts]\nqueue_s = 0"), "timeouts, queue_s"),
        (('name = "chat"', 'name = ""'), "name: use 1 to 200"),
        (('["python", "server.py"]', "[]"), "model chat, command"),
        (('"127.0.0.1:8080"', '"8080"'), "listen"),
        (("[[model]]", "speed = 1\n[[model]]"), "there is no key `speed`"),
        (("[[model]]", 'admin_token = "x"\n[[model]]'), "admin_token"),
        (("[[model]]", "[model]"), "model"),
        (("[[model]]", "[[model"), "not TOML"),
        (("port = 8000", "port = 8000\ncpus = 4\n[machine]\ncores = 2"), "one replica takes 4 cores, machine has 2"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_its_place(change, place):
    assert change[0] in SMALLEST
    with pytest.raises(BadUsage) as e:
        parse_config(SMALLEST.replace(*change), "m.toml", "/")
    assert str(e.value).startswith("m.toml: ")
    assert place in str(e.value)
    assert "\n" not in str(e.value)


def test_two_models_may_not_share_what_requests_are_routed_by():
    second = SMALLEST.split("[[model]]")[1]
    with pytest.raises(BadUsage, match="two models have the name chat"):
        parse_config(SMALLEST + "[[model]]" + second, "m.toml", "/")
    routed = SMALLEST + 'route = "/a"\n[[model]]' + second.replace('"chat"', '"other"') + 'route = "/a"\n'
    with pytest.raises(BadUsage, match="two models have the route /a"):
        parse_config(routed, "m.toml", "/")


def test_keys_and_tokens_come_from_files_beside_it(tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n")
    (tmp_path / "token").write_text("0123456789\n")
    path = tmp_path / "c.toml"
    path.write_text('admin_token_file = "token"\n' + SMALLEST + 'api_keys_file = "keys"\n')
    config = load_config(str(path))
    assert config.model[0].api_keys == ("one", "two")
    assert config.admin_token == "0123456789"
    (tmp_path / "keys").write_text("")
    with pytest.raises(BadUsage, match="nobody could ask"):
        load_config(str(path))
    with pytest.raises(NotFound, match=r"other\.toml is not there"):
        load_config(str(tmp_path / "other.toml"))
