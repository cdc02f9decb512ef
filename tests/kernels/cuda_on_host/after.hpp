// The launch of the function KERNEL, after its source.

#ifdef SHARED_BYTES
alignas(16) float4 shared[(SHARED_BYTES + 15) / 16];
#endif

namespace {

void** arguments;

template <typename... A, size_t... N>
void call(void (*kernel)(A...), std::index_sequence<N...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[N])...);
}

template <typename... A>
void call(void (*kernel)(A...)) {
    call(kernel, std::index_sequence_for<A...>());
}

template <typename... A>
constexpr size_t parameters(void (*)(A...)) {
    return sizeof...(A);
}

}  // namespace

// number: of arguments given. Returns null, or what went wrong. Shared memory holds NaN when a block starts.
extern "C" const char* launch(unsigned count, unsigned blocks, int backwards, void** given, size_t number) {
    if (number != parameters(KERNEL)) return "the function takes another number of arguments";
    arguments = given;
    fibres::message = nullptr;
    fibres::body = [] { call(KERNEL); };
    for (unsigned y = 0; y < blocks; ++y)
        for (unsigned x = 0; x < count; ++x) {
            blockIdx = {x, y, 0};
#ifdef SHARED_BYTES
            std::memset(shared, 0xff, sizeof shared);
#endif
            if (!fibres::run_block(THREADS, backwards != 0)) return fibres::message;
        }
    return nullptr;
}
