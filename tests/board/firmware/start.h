/* Between the start-up of a processor and that of the board. */
#ifndef START_H
#define START_H

int semihost(int operation, const void *argument);
void traps_start(void); /* protects memory, where that is asked for */
void start(void) __attribute__((noreturn)); /* with a stack that is painted 0xa5 */

#endif
