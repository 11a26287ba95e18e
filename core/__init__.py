"""The engine: it knows no method, family, backend or plugin by name.

Its wings, from the ground up; each imports those above it in this list only, and no imports run in a circle:

    errors      what is said to users: findings, remedies, exit codes
    utils       files, threads, seeds, devices, memory, trees of tensors, packages
    drawing     grids of images, charts of data, curves of a run
    diffusion   the formalism: schedules, predictions, guidance, solvers, losses
    settings    what users write, as validated models
    plugin_api  what plugins implement and import
    registry    where plugins come from, and whose code an error came from
    storage     objects under keys: buckets, web servers, folders
    engine      the loop: roles, optimizers, checkpoints, metrics, trackers, processes
    evaluation  teacher against student: sampling, evaluators, validation
    data        from files to batches: tables, samples, index, report, cache
    config      how files, flags and defaults become one validated configuration
    runs        a run, start to end: components, export, publishing
    testing     the conformance suite for plugins
    report      a run as one HTML page
    cli         the commands
"""
