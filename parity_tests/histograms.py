def save(record, path): pass
