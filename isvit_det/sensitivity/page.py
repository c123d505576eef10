"""The result of an analysis as rows for people, and as an HTML page."""
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from jinja2 import Environment

from isvit_det.sensitivity.measures import MEASURES, Figure

# Titles and units of the measures.
TITLES = {
    'features': 'feature error',
    'detections': 'detections changed %',
    'ap': 'box AP lost'
}
SCALES = {'features': 1., 'detections': 100., 'ap': 1.}
TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto;
  max-width: 70rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 10rem; }
td.bar span { display: block; height: .7rem; background: #4a7fb5; }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table>
<tr>{% for one in table.columns %}<th>{{ one }}</th>{% endfor %}<th></th></tr>
{% for row in table.rows %}
<tr>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}
<td class="bar"><span style="width: {{ row.share }}%"></span></td></tr>
{% endfor %}
</table></div>
{% endfor %}
</body></html>
"""


def cell(name: str, figure: Any) -> str:
    """A figure with its standard error.

    >>> cell('detections', Figure(.123, .01))
    '12.3 ± 1.0'
    >>> cell('features', Figure(.00123))
    '0.00123'
    """
    value, error = figure
    scale = SCALES[name]
    form = '{:.3g}' if name == 'features' else '{:.1f}'
    if name == 'ap':
        form = '{:.2f}'
    text = form.format(scale * value)
    return text if error is None else (
        f'{text} ± {form.format(scale * error)}')


def worst_first(parts: Mapping[str, Any], mode: str,
                bits: str) -> List[Tuple[str, Dict[str, Figure]]]:
    """Parts with their figures, those first that hurt most.

    A part that is quantized alone hurts by what it changes, and one that is
    left in float by what remains changed without it.
    """
    found = [(name, figures[mode][bits]) for name, figures in parts.items()
             if bits in figures.get(mode, {})]
    keys = [
        name for name in reversed(MEASURES)
        if all(name in one for _, one in found)
    ]
    return sorted(
        found,
        key=lambda one: [one[1][name].value for name in keys],
        reverse=mode == 'alone')


def table_of(parts: Mapping[str, Any], mode: str,
             bits: str) -> List[Dict[str, str]]:
    """Rows for a table of text, see ``worst_first``."""
    ordered = worst_first(parts, mode, bits)
    names = [
        name for name in MEASURES if any(name in one for _, one in ordered)
    ]
    return [
        dict(
            part=part,
            **{
                TITLES[name]: cell(name, one[name]) if name in one else '-'
                for name in names
            }) for part, one in ordered
    ]


def render(title: str, lines: Sequence[str], result: Mapping[str, Any],
           modes: Sequence[str], pairs: Sequence[str]) -> str:
    """A page with a table for each mode and bits; all text is escaped.

    Args:
        title: of the page.
        lines: paragraphs before the tables.
        result: of ``Analysis.run``.
        modes: of the analysis.
        pairs: bits, such as ``'w4a4'``.
    """
    words = dict(
        alone='{}: each part quantized alone, what hurts most first',
        rest='{}: all but one part quantized, what helps most to leave in '
        'float first')
    tables = []
    for mode in modes:
        for bits in pairs:
            ordered = worst_first(result['parts'], mode, bits)
            if not ordered:
                continue
            key = next(
                name for name in reversed(MEASURES)
                if any(name in one for _, one in ordered))
            values = [
                one[key].value if key in one else 0. for _, one in ordered
            ]
            top = max(values) or 1.
            rows = table_of(result['parts'], mode, bits)
            tables.append(
                dict(
                    title=words[mode].format(bits),
                    columns=list(rows[0]),
                    rows=[
                        dict(
                            cells=list(row.values()),
                            share=round(100 * max(0., value) / top))
                        for row, value in zip(rows, values)
                    ]))
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(title=title, lines=lines, tables=tables)
