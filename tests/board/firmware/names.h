/* Names of the generated model under test. */
#ifndef NAMES_H
#define NAMES_H

#include MODEL_HEADER

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define FN(name) JOIN(MODEL_NAME, name)
#define SIZE(name) JOIN(MODEL_MACRO, name)

#endif
