// The kernels of lacuna-device as functions of the host, under names of their own.

#define LACUNA_HOST
#define quantise_add lacuna_standin_quantise_add
#define mean_of lacuna_standin_mean_of
#define squares lacuna_standin_squares
#define adamw lacuna_standin_adamw
#define normalise lacuna_standin_normalise
#define crc64_pieces lacuna_standin_crc64_pieces
#include "../../device/kernels/exact.cu"
