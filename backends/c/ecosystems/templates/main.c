$signature {
    int status = begin_training();
    for (uint32_t update = 0u; status == ODTPLAN_OK && update < UPDATES; update++) {
        float loss = 0.0f;
        status = train_once(update, &loss);
        if (status == ODTPLAN_OK && (update + 1u) % 10u == 0u) {
            $tell("update %u: loss %.6f\n", (unsigned)(update + 1u), (double)loss);
        }
$pause    }
    if (status != ODTPLAN_OK) {
        $tell("error: status %d, see odtplan_error_t\n", status);
    }
$end}
