"""The history page in a real Chromium: desktop and phone, light and dark, keyboard, hostile names, accessibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser.conftest import ARTIFACTS, DESKTOP, HOSTILE, LONG, PHONE, RUNS, Visit

Open = Callable[..., Visit]

WINDOWS = [
    pytest.param(DESKTOP, "light", id="desktop"),
    pytest.param(PHONE, "light", id="phone"),
    pytest.param(DESKTOP, "dark", id="dark"),
    pytest.param(PHONE, "dark", id="dark-phone"),
]


@pytest.mark.parametrize(("viewport", "scheme"), WINDOWS)
def test_every_page_fits_and_says_nothing_on_the_console(
    visit: Open, pages: list[str], viewport: Any, scheme: str
) -> None:
    window = visit(viewport, scheme)
    for path in pages:
        page = window.go(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
    assert window.said == []


@pytest.mark.parametrize(
    ("viewport", "scheme", "which"),
    [
        pytest.param(DESKTOP, "light", slice(None), id="desktop"),
        pytest.param(PHONE, "dark", slice(0, 3), id="dark-phone"),
    ],
)
def test_every_page_is_accessible(
    visit: Open, pages: list[str], viewport: Any, scheme: str, which: slice
) -> None:
    window = visit(viewport, scheme)
    wrong = []
    for path in pages[which]:
        found = Axe().run(window.go(path)).response
        assert len(found["passes"]) > 20, path
        for rule in found["violations"]:
            wrong.append(
                (path, rule["id"], rule["nodes"][0]["html"][:200], rule["nodes"][0]["failureSummary"])
            )
    assert wrong == []


def test_the_checker_finds_what_is_not_accessible(visit: Open) -> None:
    page = visit().go(RUNS)
    page.evaluate("document.querySelector('.hqb-chart svg').removeAttribute('aria-labelledby')")
    page.evaluate("document.querySelectorAll('.hqb-chart title')[0].remove()")
    page.evaluate("document.querySelector('.hqb-summary .hqb-now').style.color = '#ddd'")
    found = {rule["id"] for rule in Axe().run(page).response["violations"]}
    assert {"svg-img-alt", "color-contrast"} <= found


def test_hostile_names_are_text_and_no_page_has_a_script_or_style_of_its_own(
    visit: Open, pages: list[str]
) -> None:
    window = visit()
    for path in pages:
        response = window.page.goto(f"{window.address}{path}", wait_until="load")
        assert response is not None
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        page = window.page
        assert page.title() != "taken over"
        assert page.locator("img[src=x]").count() == 0
        inline = (
            "scripts => scripts.filter(script => !script.src && script.type !== 'application/json').length"
        )
        assert page.locator("#content script").evaluate_all(inline) == 0, path
        assert page.locator("#content [style], #content [onclick], #content style").count() == 0, path
        shown = page.locator("#content").inner_text()
        if path not in (RUNS, ARTIFACTS):
            assert "<script>document.title='taken over'</script>" in shown
            assert LONG in shown


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit: Open, pages: list[str]) -> None:
    window = visit()
    for path in (f"{RUNS}?status__exact=failed", pages[2]):
        page = window.go(path)
        reachable = "#content a[href]:visible, #content button:visible, #content [tabindex='0']:visible"
        wanted = page.locator(reachable).count()
        assert wanted > 2
        page.locator("#content").evaluate("e => { e.tabIndex = -1; e.focus() }")
        seen, unseen = set(), []
        for _ in range(wanted + 30):
            page.keyboard.press("Tab")
            at = page.evaluate(
                """() => {
                    const e = document.activeElement;
                    if (!e || !e.closest('#content')) return null;
                    const all = [...document.querySelectorAll('#content *')];
                    const s = getComputedStyle(e);
                    const marked = s.outlineStyle !== 'none' || s.boxShadow !== 'none' || e.matches('input, select');
                    const counted = e.matches("a[href], button, [tabindex='0']");
                    return [all.indexOf(e), marked, counted, e.outerHTML.slice(0, 90)];
                }"""
            )
            if at is None:
                break
            if at[2]:
                seen.add(at[0])
            if not at[1]:
                unseen.append(at[3])
        assert len(seen) == wanted
        assert unseen == []


def test_the_top_tells_each_store_in_words_and_signs_not_by_colour_alone(visit: Open) -> None:
    cards = visit().go(RUNS).locator(".hqb-card")
    words = [text.replace("\n", " ") for text in cards.all_inner_texts()]
    assert len(words) == 2
    mine = next(text for text in words if "PostgreSQL on pg0" in text)
    other = next(text for text in words if text is not mine)
    for part in (
        "Last good daily",
        "hour",
        "Next due",
        "1 min 15 s by a deep verify",
        "Copies of the newest",
    ):
        assert part in mine
    assert "✗ The last run failed" in other
    assert HOSTILE[:60] in other


def test_each_drawing_has_a_name_and_the_same_in_words(visit: Open) -> None:
    page = visit().go(RUNS)
    drawings = page.get_by_role("img", name="PostgreSQL backups on pg0")
    assert drawings.count() == 2
    figure = page.locator(".hqb-chart").first
    assert "backups from" in figure.locator("figcaption").inner_text()
    assert (figure.locator("desc").text_content() or "nothing") in figure.locator("figcaption").inner_text()
    box = drawings.first.bounding_box()
    assert box is not None
    assert box["width"] > 150
    assert page.locator(".hqb-chart circle").count() > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_admins_own_switch(visit: Open, scheme: str) -> None:
    page = visit(DESKTOP, scheme).go(RUNS)
    read = "getComputedStyle(document.querySelector('.hqb-bad.hqb-badge')).color"
    before = page.evaluate(read)
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        colour = page.evaluate(read)
        assert (colour == before) == (theme == scheme)


def test_the_list_is_searched_and_narrowed(visit: Open) -> None:
    window = visit()
    page = window.go(RUNS)
    page.fill("#searchbar", "taken over")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=taken*")
    assert page.locator("#result_list tbody tr").count() == 7
    page = window.go(RUNS)
    page.get_by_role("navigation", name="Filter").get_by_role("link", name="Failed").click()
    assert page.locator("#result_list tbody tr").count() == 1
    assert "✗ Failed" in page.locator("#result_list tbody").inner_text()
    assert window.said == []
