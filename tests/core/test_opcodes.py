"""Pickles that would fill the memory are known before they are read."""
import io
import pickle

import pytest

from isvit_det.core.opcodes import check_memo


@pytest.mark.parametrize('protocol', range(6))
def test_any_pickle_passes_and_the_file_goes_on_where_it_was(protocol):
    value = [str(number) for number in range(400)] * 2
    file = io.BytesIO(b'before' + pickle.dumps(value, protocol))
    file.seek(6)
    check_memo(file)
    assert pickle.load(file) == value


def test_a_value_that_is_called_by_a_great_number_is_refused():
    with pytest.raises(pickle.UnpicklingError, match='2147483647'):
        check_memo(io.BytesIO(b'\x80\x02K\x01r\xff\xff\xff\x7f.'))
