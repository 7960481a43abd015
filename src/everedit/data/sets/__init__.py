"""One file a data set: ``SET`` says what it is and turns a record of its format into the fields of an edit."""
