# SPDX-License-Identifier: Apache-2.0
"""The page of `remamba ui` in a headless Chromium: what a person does with it, and that it asks no other host."""

import re
import shutil
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import remamba_hf
from remamba_hf.reading import load_for_reading
from remamba_hf.ui import Reader, served

ROOT = Path(remamba_hf.__file__).parent.parent
CARD = ROOT / "model_cards" / "remamba-tiny"
BOOK = ROOT / "examples" / "books" / "persuasion.txt"
QUESTION = "What is the secret number of Harold Marsh?"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script> {{value}} ${window.hacked=3}'
HOSTILE_NAME = "<img src=x onerror=window.hacked=4> ${window.hacked=5}"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

pytest.importorskip("gradio", reason="needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.skipif(not BOOK.exists() or not CARD.exists(), reason="needs the repository's examples and cards")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        installed = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        if installed is None and not own.exists():
            missing = "there is no Chromium (the system's package, or `playwright install chromium`)"
            warnings.warn(f"the tests of the page are SKIPPED: {missing}", stacklevel=1)  # in the summary, unlike a reason
            pytest.skip(missing)
        browser = driver.chromium.launch(executable_path=installed)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    with served(Reader(*load_for_reading(str(CARD), device="cpu"), 512), HOSTILE_NAME) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """A fresh page; at the end nothing may have been asked of another host, and nothing of a text may have run."""
    page = browser.new_page(permissions=["clipboard-read", "clipboard-write"])
    hosts, failures = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(address)
    yield page
    hacked = page.evaluate("window.hacked")
    page.close()
    assert hacked is None
    assert hosts - {""} == {urlsplit(address).netloc}
    assert not failures


def book(length: int) -> str:
    text = BOOK.read_text()[:length]
    place = text.index("\n\n", length // 3) + 1
    return f"{HOSTILE}\n{text[:place]}The secret number of Harold Marsh is 48213.\n{text[place:]}"


def paste(page, text: str) -> None:
    """As a person does it; Playwright's own `fill` takes minutes for a long text."""
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.focus("#document textarea")
    page.keyboard.press("Control+A")
    page.keyboard.press("Control+V")


def path_of(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def drop(page, path: Path) -> None:
    page.set_input_files("#file input[type=file]", path)


def open_settings(page) -> None:
    page.click("text=Settings")
    # Gradio writes the first values into the fields once more some milliseconds after they appear: faster than any person
    # types, but not than Playwright.
    page.wait_for_timeout(1000)


def set_number(page, name: str, value: str) -> None:
    field = page.locator(f"#{name} input")
    field.fill(value)
    field.press("Tab")  # Gradio takes a number over when its field is left
    playwright.expect(field).to_have_value(value)


def ask(page, question: str = QUESTION) -> None:
    page.locator("#question").locator("input, textarea").fill(question)
    page.click("#ask")


def status(page, pattern: str, seconds: float = 60) -> str:
    playwright.expect(page.locator("#status")).to_contain_text(re.compile(pattern), timeout=1000 * seconds)
    return page.inner_text("#status")


def test_paste_ask_and_see_what_was_kept(page):
    playwright.expect(page).to_have_title(f"{HOSTILE_NAME} · remamba")
    playwright.expect(page.locator("h2 + div")).to_contain_text(HOSTILE_NAME)
    paste(page, book(9_000))
    ask(page)
    status(page, "Done")
    assert page.input_value("#answer textarea") == "48213"
    best = page.eval_on_selector_all(
        "mark", "all => all.sort((a, b) => b.style.cssText > a.style.cssText ? 1 : -1)[0].innerText"
    )
    assert "48213" in best
    facts = page.inner_text("#facts")
    assert re.search(r"[\d,]+ tokens/s\s+reading", facts)
    assert re.search(r"[\d,]+ tokens/s\s+answering", facts)
    assert re.search(r"GB\s+memory", facts)
    assert page.locator("#strip line").count() > 10
    assert HOSTILE in page.inner_text("#passages")  # as text


def test_drop_a_long_file(page, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(book(20_500))
    drop(page, path)
    status(page, "characters in the file")
    open_settings(page)
    page.uncheck("#compress input")
    ask(page)
    status(page, "Done")
    assert page.input_value("#answer textarea") == "48213"
    assert "not compressed" in page.inner_text("#facts")
    page.check("#compress input")
    set_number(page, "compression_ratio", "0.01")
    page.click("#ask")
    status(page, "Reading|Starting")
    status(page, "Done")
    kept = int(re.search(r"(\d+) kept", page.inner_text("#facts")).group(1))
    assert 30 < kept < 90  # a hundredth of a window of some 6,000 tokens
    assert "places in a text of" in page.inner_text("#passages")
    assert len(page.inner_text("#passages")) < 40_000


def test_stop_and_ask_again(page):
    paste(page, book(400_000))
    ask(page)
    status(page, r"Reading: [1-9]")
    assert page.locator("#status progress").evaluate("bar => 0 < bar.value && bar.value < bar.max")
    assert not page.locator("#ask").is_enabled()
    page.click("#stop")
    status(page, "Stopped before the document was read")
    paste(page, book(3_000))
    page.click("#ask")
    status(page, "Done")
    assert page.input_value("#answer textarea") == "48213"


def test_a_closed_page_makes_way(browser, address, page):
    other = browser.new_page(permissions=["clipboard-read", "clipboard-write"])
    other.goto(address)
    paste(other, book(400_000))
    ask(other)
    status(other, r"Reading: [1-9]")
    paste(page, book(3_000))
    ask(page)
    status(page, "Waiting")
    other.close()
    status(page, "Done", seconds=15)  # reading 400,000 characters takes longer
    assert page.input_value("#answer textarea") == "48213"


def test_errors_are_sentences(page, tmp_path):
    ask(page)
    assert status(page, "empty").startswith("The document is empty")
    drop(page, path_of(tmp_path, f"{HOSTILE_NAME}.txt", b"abc\xff"))
    assert "UTF-8" in status(page, "is not a text file")
    page.click("#ask")
    status(page, "is not a text file")
    page.click("#file button[aria-label=Clear]")
    drop(page, path_of(tmp_path, "good.txt", b"some words"))
    status(page, "10 characters in the file")
    open_settings(page)
    set_number(page, "length", "0")
    page.click("#ask")
    assert status(page, "at least 1").startswith("Give a number of new tokens")
    assert page.locator("#ask").is_enabled()
    assert "Traceback" not in page.inner_text("body")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("large.txt", 10 * 2**20 + 1, "maximum allowed size of 10"), ("a.pdf", 9, "Invalid file type")],
)
def test_files_that_are_refused_at_once(page, tmp_path, name, size, message):
    drop(page, path_of(tmp_path, name, b"a" * size))
    playwright.expect(page.locator("body")).to_contain_text(message, timeout=10_000)
