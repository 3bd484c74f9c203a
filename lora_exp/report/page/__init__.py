"""The files and tables of a report: results.csv, report.md, report.html and the terminal."""
