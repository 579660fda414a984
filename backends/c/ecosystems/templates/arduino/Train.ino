static int status;
static uint32_t update;

void setup() {
    Serial.begin(115200);
    status = begin_training();
}

void loop() {
    float loss = 0.0f;
    if (status != ODTPLAN_OK) {
        Serial.print("error: status ");
        Serial.println(status); /* odtplan_error_t */
        delay(1000);
        return;
    }
    if (update == UPDATES) {
        return;
    }
    status = train_once(update, &loss);
    update++;
    if (status == ODTPLAN_OK && update % 10u == 0u) {
        Serial.print("update ");
        Serial.print(update);
        Serial.print(": loss ");
        Serial.println(loss, 6);
    }
}
