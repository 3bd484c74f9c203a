"""Readers of data files in common formats.

    file_formats    the names of the formats, and the suffixes of their files
    file_content    the kind of a file, from its first bytes, and decompression
    data_files      the files of `data.path`: a file, a list, a pattern, a directory
    row_formats     the format of a file, and its rows
    json_rows       rows of JSON lines, arrays and objects
    csv_rows        rows of CSV and TSV files
    arrow_rows      rows of Parquet and Arrow files
    hf_datasets     rows of Hugging Face datasets: saved in a directory, or on the hub
    row             a row: its fields, and its place in the file
    columns         which column of a row has which role
    layouts         the document in the columns of a row
    message_forms   the messages of a row, in the form that chat templates read
"""
