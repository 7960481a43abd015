"""One file a data set: ``convert`` turns a record of its format into the fields of an edit."""
