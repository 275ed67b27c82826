"""From run records to tables, figures and one page that answers the question. Rows in, files out."""

from sparse_ft.analysis.holes import holes, protocols
from sparse_ft.analysis.performance import curves
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.analysis.terminal import print_table, table_text, terminal_table
from sparse_ft.analysis.write import AnalysisResult, write_analysis

__all__ = [
    "AnalysisResult",
    "cell_table",
    "curves",
    "grouped_table",
    "holes",
    "print_table",
    "protocols",
    "table_text",
    "terminal_table",
    "write_analysis",
]
