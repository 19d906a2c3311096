/* Preloaded into a process, refuses and notes every name looked up and every address connected to that is not of this
   machine: a line each in the file that LOOKUPS names. */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static void note(const char *what) {
    const char *path = getenv("LOOKUPS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file == NULL) abort();
    fprintf(file, "%s\n", what);
    fclose(file);
}

template <typename Function> static Function *real(Function *, const char *name) {
    return reinterpret_cast<Function *>(dlsym(RTLD_NEXT, name));
}

static int is_here(const struct sockaddr *address) {
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)address)->sin_addr.s_addr) >> 24 == 127;
    if (address->sa_family == AF_INET6) return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)address)->sin6_addr);
    return 1;
}

static int refused(const struct sockaddr *address) {
    if (address == NULL || is_here(address)) return 0;
    char name[INET6_ADDRSTRLEN] = "";
    const void *place = address->sa_family == AF_INET ? (const void *)&((const struct sockaddr_in *)address)->sin_addr
                                                      : &((const struct sockaddr_in6 *)address)->sin6_addr;
    note(inet_ntop(address->sa_family, place, name, sizeof name));
    errno = ECONNREFUSED;
    return 1;
}

extern "C" int connect(int socket, const struct sockaddr *address, socklen_t size) {
    return refused(address) ? -1 : real(connect, "connect")(socket, address, size);
}

extern "C" ssize_t sendto(
    int socket, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    return refused(address) ? -1 : real(sendto, "sendto")(socket, data, size, flags, address, length);
}

extern "C" int getaddrinfo(
    const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    if (name == NULL || !strcmp(name, "localhost") || !strncmp(name, "127.", 4) || !strcmp(name, "::1"))
        return real(getaddrinfo, "getaddrinfo")(name, service, hints, found);
    note(name);
    return EAI_NONAME;
}
