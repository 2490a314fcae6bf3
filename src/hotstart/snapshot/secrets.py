"""Which variables of an environment look like secrets. Pure, and a guess: it reports, others decide.

A name gives a secret away (OPENAI_API_KEY, PGPASSWORD), or a value does (a URL with a password, a private key, the prefix that
many services give their tokens). What only says where a secret lies or what it is like (TOKEN_FILE, PASSWORD_MIN_LENGTH) is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Also glued to what stands before: PGPASSWORD, GITHUBTOKEN.
_PASSWORD = re.compile(r"(?:PASSWORD|PASSWD|PASSPHRASE)S?$")
_SECRET = re.compile(r"(?:SECRET|CREDENTIAL|TOKEN|APIKEY|ACCESSKEY|SECRETKEY|PRIVATEKEY)S?$")
# Only as words of their own: KEYBOARD, MONKEY and BYPASS are none.
_SECRET_WORDS = {"KEY", "KEYS", "PSK", "JWT", "COOKIE"}
# Only at the end, behind something else: REDISCLI_AUTH and MYSQL_PWD are, SSH_AUTH_SOCK and PWD are not.
_SECRET_LAST = {"PWD", "AUTH", "PAT"}
# Behind a secret word: this is about the secret, not the secret.
_ABOUT = re.compile(
    r"(?:FILE|FILENAME|PATH|DIR|DIRECTORY|FOLDER|SOCK|SOCKET|COMMAND|CMD|HELPER|NAME|ID|ARN|TYPE|KIND|FORMAT|ALGORITHM|ALGO"
    r"|PROVIDER|BACKEND|HEADER|PREFIX|SUFFIX|LENGTH|SIZE|BITS|COUNT|LIMIT|MAX|MIN|TTL|EXPIRY|EXPIRES|EXPIRATION|TIMEOUT|AGE|DAY"
    r"|ROTATION|REFRESH|ENABLED|DISABLED|REQUIRED|LAYOUT|MAP|URL|URI|ENDPOINT|HOST|PORT|ADDR|TCP|UDP|PROTO|VERSION|REGION)S?"
)
# Before KEY or TOKEN: those of public keys, of databases and of language models are for everybody.
_HARMLESS = re.compile(
    r"\b(?:PUBLIC|PUB|AUTHORIZED|GPG|PRIMARY|FOREIGN|PARTITION|SORT|CACHE|PAD|BOS|EOS|UNK|SEP|CLS|MASK|STOP) (?:KEY|TOKEN)S?\b"
)
_NAMES = {"DOCKER_AUTH_CONFIG"}

_SECRET_VALUE = re.compile(
    r"[a-z][a-z0-9+.-]{0,20}://[^/\s:@]*:[^/\s@]+@"  # a URL with a password
    r"|(?i:password|passwd|;\s*pwd|accountkey|sharedaccesskey)\s*=\s*[^\s;]"  # a connection string
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bgh[opsur]_[A-Za-z0-9]{30}|\bgithub_pat_\w{30}|\bglpat-[\w-]{20}"
    r"|\bhf_[A-Za-z0-9]{30}|\bsk-[A-Za-z0-9_-]{20}|\bnvapi-[\w-]{30}"
    r"|\bhooks\.slack\.com/services/|\bxox[abeprs]-[\w-]{10}|\bAIza[\w-]{35}"
    r"|\beyJ[\w-]{10,1000}\.eyJ[\w-]{10}"  # a JSON web token
)
_SWITCHES = {"0", "1", "true", "false", "yes", "no", "on", "off", "none", "null"}
# No base64 has a '.', and none of some length has small letters alone.
_A_PATH = re.compile(r"~?(?:/[a-z0-9._@-]+)+/?|~?/.*\.[A-Za-z0-9]{1,8}")


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the variables that look like secrets, sorted.

    >>> secret_names({"HF_TOKEN": "abc", "HF_TOKEN_PATH": "/t", "KEYBOARD": "us", "DATABASE_URL": "pg://me:pw@db/x"})
    ('DATABASE_URL', 'HF_TOKEN')
    """
    return tuple(sorted(name for name, value in environment.items() if _is_secret(name, value)))


def _is_secret(name: str, value: str) -> bool:
    if not value or value.lower() in _SWITCHES:
        return False
    if _SECRET_VALUE.search(value) or name.upper() in _NAMES:
        return True
    spaced = re.sub(r"[^A-Z0-9]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper())
    words = _HARMLESS.sub("", spaced).split()
    while len(words) > 1 and words[-1].isdigit():  # API_KEY_2
        words.pop()
    if not words or _ABOUT.fullmatch(words[-1]):
        return False
    if any(map(_PASSWORD.search, words)) or (len(words) > 1 and words[-1] == "PASS"):
        return True
    if _A_PATH.fullmatch(value) or (words[-1] in ("TOKENS", "KEYS") and value.isdigit()):
        return False
    if len(words) > 1 and words[-1] in _SECRET_LAST:
        return True
    return any(_SECRET.search(word) or word in _SECRET_WORDS for word in words)
