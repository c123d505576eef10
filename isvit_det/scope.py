"""Configs named ``isvit_det::FOLDER/NAME.py``, wherever MMEngine reads them.

MMEngine looks names of configs up in the folder ``.mim`` of a package, if the
package is one of its table's.
"""
from mmengine.config.utils import MODULE2PACKAGE

MODULE2PACKAGE['isvit_det'] = 'isvit_det'
