"""Which variables look like secrets, over what environments of workers, containers, CI and desktops really hold."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.snapshot.secrets import secret_names

# Every value here is made up; pieces are put together so that no scanner takes them for real ones.
SECRETS = {
    "OPENAI_API_KEY": "sk" + "-proj-" + "a1B2" * 10,
    "ANTHROPIC_API_KEY": "whatever",
    "HF_TOKEN": "hf" + "_" + "aB3" * 12,
    "HUGGING_FACE_HUB_TOKEN": "x",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "NGC_API_KEY": "bmdj",
    "VLLM_API_KEY": "token-abc123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjE",
    "AWS_ACCESS_KEY_ID": "AKIA" + "IOSFODNN7EXAMPLE",
    "AZURE_CLIENT_SECRET": "q~1",
    "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=Zm9v;",
    "GITHUB_TOKEN": "gh" + "p_" + "A1" * 18,
    "GITHUBTOKEN": "x",
    "CI_JOB_TOKEN": "64_x",
    "NPM_TOKEN": "x",
    "npm_config__authToken": "x",
    "NODE_AUTH_TOKEN": "x",
    "DOCKER_AUTH_CONFIG": '{"auths":{}}',
    "DB_PASSWORD": "1234",
    "POSTGRES_PASSWORD": "/a/path/like/password",
    "PGPASSWORD": "p",
    "MYSQL_PWD": "p",
    "DB_PASS": "p",
    "SMTP_PASSWD": "p",
    "GPG_PASSPHRASE": "correct horse",
    "REDISCLI_AUTH": "p",
    "SECRET_KEY": "django-insecure",
    "SECRET_KEY_BASE": "rails",
    "DJANGO_SECRET_KEY_2": "x",
    "APP_KEY": "base64:AAAA",
    "API_KEYS": "one,two",
    "JWT_SECRET": "x",
    "SESSION_COOKIE": "x",
    "WIFI_PSK": "x",
    "HOTSTART_STORE_KEY": "00" * 32,
    "SSH_PRIVATE_KEY": "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Bl",
    "SIGNING": "-----BEGIN " + "PRIVATE KEY-----\nMC4C",
    "DATABASE_URL": "postgresql://app:pw@db.internal:5432/app",
    "REDIS_URL": "redis://:pw@cache:6379/0",
    "SENTRY_DSN": "https://public:private@sentry.example/1",
    "https_proxy": "http://me:pw@proxy:3128",
    "PIP_INDEX_URL": "https://__token__:pypi-x@packages.example/simple",
    "JAVA_TOOL_OPTIONS": "-Djavax.net.ssl.keyStorePassword=changeit",
    "MSSQL": "Server=db;Uid=sa;Pwd=x;",
    "SLACK_WEBHOOK_URL": "https://hooks.slack.com/services/T0/B0/x",
    "BEARER": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0" + ".sig",
    "EXTRA_ARGS": "--api-key sk" + "-" + "abcdefghijklmnopqrstuv",
    "apiKey": "x",
    "GOOGLE_CREDENTIALS": '{"type": "service_account"}',
}

HARMLESS = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "PWD": "/root",
    "OLDPWD": "/",
    "OLD_PWD": "/srv/app",
    "HOME": "/root",
    "SHELL": "/bin/bash",
    "SHLVL": "1",
    "LS_COLORS": "rs=0:di=01;34:ln=01;36",
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
    "KEYBOARD": "us",
    "XKB_KEYMAP": "de",
    "KEYTIMEOUT": "1",
    "MONKEY": "banana",
    "TURKEY_REGION": "tr",
    "BYPASS": "lane",
    "COMPASS_HEADING": "north",
    "SSH_AUTH_SOCK": "/tmp/ssh-XXXX/agent.1",
    "SSH_ASKPASS": "/usr/lib/ssh/ssh-askpass",
    "GIT_ASKPASS": "/usr/bin/askpass",
    "SSH_CONNECTION": "10.0.0.1 50000 10.0.0.2 22",
    "XAUTHORITY": "/root/.Xauthority",
    "GPG_AGENT_INFO": "/run/user/0/gnupg/S.gpg-agent:0:1",
    "GNOME_KEYRING_CONTROL": "/run/user/0/keyring",
    "XDG_SESSION_ID": "3",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/0/bus",
    "AUTHOR": "somebody",
    "GPG_KEY": "A035C8C19219BA821ECEA86B64E628F8D684696D",
    "PYTHON_SHA256": "07a4356e912900e61a15cb0949a06c4a05012e213ecd6b4e84d0f67aabbee372",
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "4096",
    "VLLM_MAX_NUM_BATCHED_TOKENS": "8192",
    "PAD_TOKEN": "<pad>",
    "EOS_TOKEN": "</s>",
    "STOP_TOKENS": "<|im_end|>",
    "TOKEN_LIMIT": "4096",
    "HF_TOKEN_PATH": "/root/.cache/huggingface/token",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/eks.amazonaws.com/serviceaccount/token",
    "AWS_SHARED_CREDENTIALS_FILE": "/root/.aws/credentials",
    "GOOGLE_APPLICATION_CREDENTIALS": "/etc/gcp/key.json",
    "POSTGRES_PASSWORD_FILE": "/run/secrets/db",
    "PASSWORD_MIN_LENGTH": "8",
    "PASSWORD_STORE_DIR": "/root/.password-store",
    "DISABLE_PASSWORD_LOGIN": "true",
    "PASSWORDLESS": "maybe",
    "SECRET_NAME": "db-credentials",
    "VAULT_SECRETS_SERVICE_HOST": "10.96.0.7",
    "VAULT_SECRETS_PORT": "tcp://10.96.0.7:8200",
    "VAULT_SECRETS_PORT_8200_TCP": "tcp://10.96.0.7:8200",
    "KEYCLOAK_URL": "https://sso.example",
    "KMS_KEY_ID": "alias/app",
    "KMS_KEY_ARN": "arn:aws:kms:eu-west-1:1:key/x",
    "HOTSTART_STORE_KEY_FILE": "/etc/hotstart/key",
    "HOTSTART_STORE_KEY_COMMAND": "kms-decrypt /etc/hotstart/wrapped",
    "TLS_KEY": "/etc/ssl/private/server.pem",
    "K8S_TOKEN": "/var/run/secrets/kubernetes.io/serviceaccount/token",
    "SSH_PUBLIC_KEY": "ssh-ed25519 AAAAC3Nz me@laptop",
    "AUTHORIZED_KEYS": "ssh-ed25519 AAAAC3Nz me@laptop",
    "CACHE_KEY": "v1-linux",
    "PARTITION_KEY": "tenant",
    "HTTP_PROXY": "http://proxy:3128",
    "GIT_URL": "ssh://git@host.example/repo",
    "DATABASE_HOST": "db.internal",
    "API_KEY": "",
    "USE_AUTH": "1",
    "PROMPT_COMMAND": "history -a; pwd",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "_": "/usr/bin/env",
    "__": "x",
    "1": "x",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_found(name):
    assert secret_names({name: SECRETS[name]}) == (name,)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_secret_is_not_reported(name):
    assert secret_names({name: HARMLESS[name]}) == ()


def test_the_names_are_sorted_and_nothing_but_names():
    assert secret_names(HARMLESS | dict(reversed(SECRETS.items()))) == tuple(sorted(SECRETS))
    assert secret_names({}) == ()


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5))
def test_any_environment_is_looked_through(environment):
    assert set(secret_names(environment)) <= set(environment)


@given(st.text("ABCXYZ_", max_size=8), st.sampled_from(["PASSWORD", "_TOKEN", "_SECRET", "_API_KEY", "_CREDENTIALS"]))
def test_what_stands_before_makes_no_secret_harmless(before, end):
    assert secret_names({before + end: "Sesame7"})


def test_hostile_values_do_not_take_long():
    pieces = ("a", "a:", "://:", "a://", "/a.", "eyJ", "-eyJ", ";pwd ", "password ", "-----BEGIN ", "~/.")
    began = time.process_time()
    for piece in pieces:
        secret_names({"X": piece * (100_000 // len(piece)), "A_KEY": piece * (100_000 // len(piece))})
    assert time.process_time() - began < 5
