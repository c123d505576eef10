"""Reports in a real browser: what can be clicked, and nothing is fetched.

Skipped where there is no Chromium; ``make test-browser`` names its package.
"""
import pytest

from isvit_det.page.write import write_comparison, write_page
from tests.page.browser import Browser, find_browser
from tests.page.made import make_run
from tests.page.test_pages import ODD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None,
        reason='there is no Chromium; the package chromium of Debian has it')
]


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp('profile')) as found:
        yield found


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    """Reports by what is special about their runs."""
    folder = tmp_path_factory.mktemp('pages')
    runs = dict(
        plain=make_run(folder / 'plain'),
        odd=make_run(folder / 'odd "<i>', ODD),
        many=make_run(folder / 'many', [f'class {i}' for i in range(80)]),
        nothing=make_run(
            folder / 'nothing', found={i: []
                                       for i in range(1, 5)}),
        boxes=make_run(folder / 'boxes', masks=False),
        alone=make_run(folder / 'alone', float=None, truth=None))
    made = {
        name: write_page(run / 'result.json')
        for name, run in runs.items()
    }
    made['sides'] = write_comparison([runs['plain'], runs['boxes']])
    return made


@pytest.fixture
def shown(browser, pages):
    """Shows a page; at the end it has complained of nothing."""
    browser.complaints.clear()
    browser.requests.clear()

    def show(name, **window):
        browser.open(pages[name], **window)
        return browser

    yield show
    assert browser.complaints == []
    assert all(
        address.startswith(('file:', 'data:')) for address in browser.requests)


NAMES = ['plain', 'odd', 'many', 'nothing', 'boxes', 'alone', 'sides']


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('width', [1280, 390])
def test_every_page_opens_and_is_as_wide_as_the_window(shown, name, width):
    page = shown(name, width=width)
    assert page.run('document.documentElement.scrollWidth') <= width
    assert page.run('typeof window.hacked') == 'undefined'
    # Every picture was decoded.
    assert page.run("[...document.querySelectorAll('.panel use')].every("
                    'one => one.getBBox().width > 0)')
    assert page.run("document.querySelectorAll('table').length") > 1


def column(page, table, index):
    return page.run(f"[...document.querySelectorAll('{table} tbody tr')].map("
                    f'row => row.cells[{index}].textContent.trim())')


def click(page, selector):
    page.run(f"document.querySelector('{selector}').click()")


def test_a_click_sorts_a_column_and_another_one_turns_it(shown):
    page = shown('plain')
    table = '#units table'
    # By what hurts: the final error, largest first.
    assert column(page, table, 1) == ['stages.2', 'stages.1', 'stages.0']
    head = f'{table} th:nth-child(1)'
    click(page, f'{head} button')
    assert column(page, table, 0) == ['1', '2', '3']
    assert page.run(
        f"document.querySelector('{head}').ariaSort") == 'ascending'
    click(page, f'{head} button')
    assert column(page, table, 0) == ['3', '2', '1']
    click(page, f'{table} th:nth-child(2) button')
    assert column(page, table, 1) == ['stages.0', 'stages.1', 'stages.2']
    assert page.run(f"document.querySelector('{head}').ariaSort") is None


def test_numbers_sort_as_numbers_and_nothing_comes_last(shown):
    page = shown('plain')
    table = '#layers table'
    click(page, f'{table} th:nth-child(8) button')
    assert column(page, table, 7) == ['15', '–']
    click(page, f'{table} th:nth-child(8) button')
    assert column(page, table, 7) == ['15', '–']


def test_a_long_table_is_folded_and_sorts_as_a_whole(shown):
    page = shown('many')
    rows = ("[...document.querySelectorAll('table.classes')[0].tBodies[0]."
            'rows].filter(row => row.offsetHeight > 0)')
    assert page.run(f'{rows}.length') == 20
    click(page, 'table.classes th:nth-child(1) button')
    assert page.run(f'{rows}.length') == 20
    assert page.run(f'{rows}[2].cells[0].textContent.trim()') == 'class 2'
    click(page, '.unfold')
    assert page.run(f'{rows}.length') == 80


def visible(page, x):
    """Which of the models is seen at a share of a picture's width."""
    return page.run(f'''(() => {{
        const box = document.querySelector('.panel.before').
            getBoundingClientRect();
        window.scrollTo(0, window.scrollY + box.top - 100);
        const now = document.querySelector('.panel.before').
            getBoundingClientRect();
        return document.elementFromPoint(now.left + {x} * now.width,
            now.top + now.height / 2).closest('.panel').classList[1];
    }})()''')


def test_a_slider_uncovers_one_model_or_the_other(shown):
    page = shown('plain')
    page.run("document.documentElement.style.scrollBehavior = 'auto'")
    assert visible(page, .9) == 'before'
    click(page, '[data-mode=slide]')
    assert visible(page, .2) == 'before' and visible(page, .8) == 'after'
    click(page, '[data-at="100"]')
    assert visible(page, .8) == 'before'
    click(page, '[data-at="0"]')
    assert visible(page, .2) == 'after'
    page.run("const range = document.querySelector('.slider input');"
             "range.value = 70; range.dispatchEvent(new Event('input'))")
    assert visible(page, .6) == 'before' and visible(page, .8) == 'after'
    click(page, '[data-mode=sides]')
    assert visible(page, .9) == 'before'
    assert page.run("getComputedStyle(document.querySelector('.slider'))."
                    'display') == 'none'


def test_a_phone_starts_with_the_slider(shown):
    assert shown(
        'plain', width=390).run("document.body.classList.contains('slide')")


def brightness(page, selector, what):
    return page.run(
        f"getComputedStyle(document.querySelector('{selector}')).{what}."
        'match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)')


def test_dark_and_light(shown):
    for dark in (True, False):
        page = shown('plain', dark=dark)
        ground = brightness(page, 'body', 'backgroundColor')
        text = brightness(page, 'body', 'color')
        plot = brightness(page, '.plot text', 'fill')
        assert (ground < 150 and text > 550 and plot > 550) if dark else (
            ground > 700 and text < 150 and plot < 150)


def test_it_prints_without_what_cannot_be_clicked(shown):
    page = shown('plain')
    page.call('Emulation.setEmulatedMedia', media='print')
    assert page.run("[...document.querySelectorAll('button.unfold, nav, "
                    ".modes, .slider')].every(one => one.offsetHeight == 0)")
    page.call('Emulation.setEmulatedMedia', media='')


def test_the_browser_notices_errors_and_requests(browser, tmp_path):
    """The tests above would see them."""
    browser.complaints.clear()
    path = tmp_path / 'bad.html'
    path.write_text('<img src="http://127.0.0.1:9/x.png">'
                    '<script>console.error("a"); missing()</script>')
    browser.open(path)
    assert len(browser.complaints) >= 2
    assert 'http://127.0.0.1:9/x.png' in browser.requests
