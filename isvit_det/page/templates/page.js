'use strict';
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    return 'value' in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = rows.some((row) => value(row, column) !== null);
    rows.sort((a, b) => {
      let order;
      if (numeric) {
        const [x, y] = [value(a, column), value(b, column)];
        // What has no value stays below.
        if (x === null || y === null) return (x === null) - (y === null);
        order = x - y;
      } else {
        order = a.cells[column].textContent.trim().localeCompare(
          b.cells[column].textContent.trim(), undefined, {numeric: true});
      }
      return descending ? -order : order;
    });
    const limit = rows.length - body.querySelectorAll('.more').length;
    rows.forEach((row, place) => row.classList.toggle('more', place >= limit));
    body.append(...rows);
  };
  for (const table of document.querySelectorAll('table.sortable')) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector('button').addEventListener('click', () => {
        const descending = head.getAttribute('aria-sort') === 'ascending';
        for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
        head.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
        sort(table, column, descending);
      });
    });
  }
  for (const button of document.querySelectorAll('.unfold')) {
    button.addEventListener('click', () => {
      button.previousElementSibling.querySelector('table').classList.remove('folded');
      button.remove();
    });
  }
  const modes = [...document.querySelectorAll('[data-mode]')];
  const choose = (mode) => {
    document.body.classList.toggle('slide', mode === 'slide');
    for (const button of modes) button.setAttribute('aria-pressed', String(button.dataset.mode === mode));
  };
  for (const button of modes) button.addEventListener('click', () => choose(button.dataset.mode));
  for (const slider of document.querySelectorAll('.slider')) {
    const range = slider.querySelector('input');
    const move = () => slider.closest('.picture').style.setProperty('--at', `${range.value}%`);
    range.addEventListener('input', move);
    for (const button of slider.querySelectorAll('button')) {
      button.addEventListener('click', () => { range.value = button.dataset.at; move(); });
    }
  }
  // Side by side, pictures would be too small on a phone.
  if (modes.length && window.matchMedia('(max-width: 700px)').matches) choose('slide');
})();
