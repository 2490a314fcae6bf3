"""The dashboard in a real Chromium: what is seen without a scroll or a click, on a phone and on a desk, by day and by night."""

import asyncio
import json
import threading
import time

import pytest

from hotstart.serve import loop
from hotstart.serve.config import parse_config
from hotstart.serve.events import Events
from hotstart.serve.gateway import Gateway
from hotstart.serve.launcher import Savings, Usage, Waterfall
from hotstart.serve.lifecycle import State
from hotstart.serve.pages import ServePages
from hotstart.serve.pool import ReplicaPool

from .browser import chromium
from .memory_launcher import MemoryLauncher

TOKEN = "a-token-of-a-test"
CONFIG = f"""
listen = "127.0.0.1:0"
admin_token = "{TOKEN}"
""" + "".join(
    f'[[model]]\nname = "{name}"\ncommand = ["worker"]\nport = 8000\nmax_replicas = 4\nidle_s = 1000\nquiet_s = 1000\nhealth_every_s = 1000\n'
    for name in ("chat", "embeddings<b>&", "broken")
)
STAGES = {
    "check": 0.004,
    "spawn": 0.006,
    "mounts": 0.011,
    "criu": 0.031,
    "renew": 0.004,
    "ready": 0.33,
    "unaccounted": 0.004,
}
SIZES = [(390, 844), (1280, 800)]


class Story:
    """A server with a past: one model hot with two replicas, one cold, one that cannot be started."""

    def __init__(self):
        self.launcher = MemoryLauncher()
        self.pool = self.address = None
        self._up, self._end = threading.Event(), None
        self._thread = threading.Thread(target=lambda: loop.run(self._serve()))
        self._thread.start()
        assert self._up.wait(30)

    async def _serve(self):
        config = parse_config(CONFIG, "c.toml", "/")
        events = Events(time.time)
        self.pool = pool = ReplicaPool(self.launcher, config, events)
        self.pages = pages = ServePages(pool, lambda: config, time.monotonic)
        events.listen(pages.metrics.happened)
        pages.savings = Savings(5 << 30, 2 << 30)
        gateway = Gateway(config.gateway, pool, pages.pages, pages.metrics.served)
        for name in ("chat", "embeddings<b>&"):
            self.launcher.snapshots.add((name, "0" * 12))
        await pool.start()
        self.tell(pool)
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.address = "http://{}:{}".format(*await gateway.start())
        task = asyncio.create_task(pool.run(gateway.traffic))
        for _ in range(2):
            await pool.restore("chat")
        while len(pool.replicas("chat")) < 2:
            await asyncio.sleep(0.01)
        self.tell(pool)
        self._up.set()
        await self._end.wait()
        await gateway.stop(1)
        await pool.close()
        await task

    def tell(self, pool):
        chat, other, broken = pool.models["chat"], pool.models["embeddings<b>&"], pool.models["broken"]
        chat.cold = Waterfall("chat", "cold", 62.4, {"start": 58.1, "warm-up": 4.3}, time.time())
        chat.waterfalls = [
            Waterfall(
                "chat.1",
                "restore",
                sum(STAGES.values()) + extra,
                {**STAGES, "criu": 0.031 + extra},
                time.time(),
                "mapped",
            )
            for extra in (0.0, 0.02, 0.1)
        ]
        for member in chat.members.values():
            member.usage = Usage(3 << 30, 1100 << 20, 31 << 20)
            assert member.state is not State.GONE
        other.cold = Waterfall("e", "cold", 8.3, {"start": 8.0, "warm-up": 0.3}, time.time())
        other.waterfalls = [Waterfall("e.1", "restore", 0.041, {"criu": 0.03, "ready": 0.011}, time.time(), "mapped")]
        broken.failures, broken.last_failure = 3, "it could not be started: no program worker: is the path right?"

    def close(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@pytest.fixture(scope="module")
def story():
    told = Story()
    yield told
    told.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory, story):
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


SEEN = """(() => {
  const inside = (e) => { const r = e.getBoundingClientRect();
    const top = document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2);
    return r.width > 0 && r.height > 0 && r.left >= 0 && r.right <= innerWidth && r.top >= 0 && r.bottom <= innerHeight && !!top && (e.contains(top) || top.contains(e)); };
  return [...document.querySelectorAll('[data-model]')].map((c) => ({
    model: c.dataset.model,
    phase: inside(c.querySelector('.phase')) && c.querySelector('.phase').textContent,
    times: [...c.querySelectorAll('.race .num')].filter(inside).map((e) => e.textContent),
    verdict: [...c.querySelectorAll('.verdict')].filter(inside).map((e) => e.textContent).join(),
  }));
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_without_a_scroll_or_a_click_it_shows_what_is_hot_and_what_the_last_restore_cost(
    page, story, width, height, dark
):
    page.size(width, height, dark)
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    assert page.run("scrollY") == 0
    seen = {m["model"]: m for m in page.run(SEEN)}
    assert seen["chat"]["phase"] == "hot"
    assert seen["chat"]["times"] == ["390 ms", "62.4 s"]
    assert "160 times faster" in seen["chat"]["verdict"]
    assert seen["embeddings<b>&"]["phase"] == "cold"
    assert seen["embeddings<b>&"]["times"] == ["41 ms", "8.30 s"]
    assert seen["broken"]["phase"] == "failing"
    outside = (
        f"[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > {width}).length"
    )
    assert page.run(outside) == 0, "nothing sticks out sideways"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(page, story, dark):
    page.size(1280, 800, dark)
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    poor = page.run(
        """(() => {
      const light = (c) => { const v = c.match(/[\\d.]+/g).map(Number).slice(0, 3).map((x) => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255,255,255)'; };
      return [...document.querySelectorAll('body *')].filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.offsetParent && !/SCRIPT|STYLE/.test(e.tagName)).map((e) => {
        const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.className, e.textContent.slice(0, 40)]; }).filter(([ratio]) => ratio < 4.5);
    })()"""
    )
    assert poor == [], "contrast of WCAG 2.2, level AA"


def test_it_asks_no_other_host_and_nothing_goes_wrong(page, story):
    page.requests.clear()
    page.complaints.clear()
    page.size(1280, 800)
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    time.sleep(1.5)
    page.run("1")
    assert {url.partition("/ui")[0] for url in page.requests if not url.startswith("data:")} == {story.address}
    assert page.complaints == []
    blocked = page.run(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation', () => done('blocked'));"
        " const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.head.append(s);"
        " setTimeout(() => done(String(window.pwned)), 2000); })"
    )
    assert blocked == "blocked"


def test_names_are_text_and_no_markup(page, story):
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    assert page.run("document.querySelectorAll('#models b').length") == 0
    assert "embeddings<b>&" in page.run("document.body.innerText")


def test_memory_that_is_shared_and_what_the_store_saves_are_told(page, story):
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    text = page.run("document.body.innerText")
    assert "2.1 GiB for 2, which see 6.0 GiB: 3.9 GiB shared" in text
    assert "2.0 GiB for snapshots of 5.0 GiB, 60 % saved" in text


def test_the_buttons_need_the_token_and_do_what_they_say(page, story):
    page.size(390, 844)
    page.open(f"{story.address}/ui")
    page.until("document.querySelectorAll('[data-model]').length === 3")
    press = """document.querySelector('[data-model="chat"] [data-action="drain"]').click()"""
    page.run(press)
    page.until("document.getElementById('said').textContent.includes('wrong')")
    assert len(story.pool.replicas("chat")) == 2
    page.run(
        f"(() => {{ const s = document.getElementById('secret'); s.value = {json.dumps(TOKEN)}; s.dispatchEvent(new Event('input')); }})()"
    )
    page.run(press)
    page.until("document.querySelector('[data-model=\"chat\"] .phase').textContent === 'paused'")
    assert len(story.pool.replicas("chat")) == 0
    page.run("""document.querySelector('[data-model="chat"] [data-action="restore"]').click()""")
    page.until("document.querySelector('[data-model=\"chat\"] .phase').textContent === 'hot'")
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    smallest = page.run(
        "Math.min(...[...document.querySelectorAll('button')].map((b) => b.getBoundingClientRect().height))"
    )
    assert smallest >= 24, "WCAG 2.2, target size"
