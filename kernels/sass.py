def check(data, log):
    return []
