"""Tables, curves, drawings and verdicts, made from the paper's numbers and the runs' records alone: never trains."""

from replication.report.claims import findings, scorecard
from replication.report.diagrams import figure_2, figure_3, figure_5
from replication.report.error_curves import curves, figure_1, figure_4, figure_6, figure_depths, save_figure, speeds
from replication.report.tables import (
    caution,
    errors,
    listed,
    readable,
    save_errors,
    save_table,
    spelled,
    styled,
    tested,
    what_is,
    yardsticks,
)

__all__ = ["findings", "scorecard"]
__all__ += ["curves", "figure_1", "figure_2", "figure_3", "figure_4", "figure_5", "figure_6", "figure_depths"]
__all__ += ["save_figure", "speeds"]
__all__ += ["caution", "errors", "listed", "readable", "save_errors", "save_table", "spelled", "styled", "tested"]
__all__ += ["what_is", "yardsticks"]
