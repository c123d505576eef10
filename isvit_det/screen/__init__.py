"""What a command shows of its work; a log file keeps the rest."""
from isvit_det.screen.output import Screen, say, showing, watch
from isvit_det.screen.progress import duration, track

__all__ = ['Screen', 'duration', 'say', 'showing', 'track', 'watch']
