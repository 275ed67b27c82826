"""From run records to tables, figures and one page that answers the question. Rows in, files out."""
