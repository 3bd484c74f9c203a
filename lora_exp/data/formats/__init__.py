"""Files of rows, in every format in which data sets are kept.

    file_content    what a path is, and its bytes without compression
    data_files      `data.path` as a list of files: a file, a list, a pattern, a directory
    row_formats     the format of a file, and its rows
    json_rows       rows of JSON lines, arrays and objects
    csv_rows        rows of tables in text
    arrow_rows      rows of Parquet and Arrow files
    hf_datasets     rows of data sets of Hugging Face: saved in a directory, or on the hub
    row             a row: its fields, and where it stands
    layouts         the columns of a row and what they mean
    message_forms   the messages of a row, as chat templates read them
"""
